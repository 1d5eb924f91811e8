"""Copies of a store's rows in other formats."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet as pq
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.durable import new_directory
from hf_sketch.store.blocks import row_blocks, sketch_matrix

_FILE_ELEMENTS = 2**28


def export_sketches(
    datasets: Mapping[str, Dataset | None], to: str, output: Path
) -> list[Path]:
    """Write all rows to a new directory, sketches in float32, memory bounded.

    If it is interrupted there is no such directory.

    Args:
        datasets: the rows of each kind; None or an empty one writes no file.
        to: "parquet", one file per kind; "lance", one dataset per kind; "npy", one file
            per column; "safetensors", files of up to 2**28 numbers with one tensor per
            column.
        output: the new directory.

    Returns:
        the files.

    Raises:
        ValueError: the format is unknown.
        FileExistsError: the directory exists.
        ModuleNotFoundError: "lance" needs pylance, which is not installed.
    """
    if to not in FORMATS:
        raise ValueError(f"to is {to!r}. Pass one of {tuple(FORMATS)}.")
    written: list[Path] = []
    with new_directory(output) as part:
        for kind, dataset in datasets.items():
            if dataset is not None and len(dataset):
                written += FORMATS[to](dataset, part, kind)
    return [output / path.name for path in written]


def _to_parquet(dataset: Dataset, output: Path, kind: str) -> list[Path]:
    path = output / f"{kind}.parquet"
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in _tables(dataset):
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
    return [path]


def _to_lance(dataset: Dataset, output: Path, kind: str) -> list[Path]:
    try:
        lance = importlib.import_module("lance")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Export to Lance needs pylance. Call pip install "hf-sketch[lance]".'
        ) from error
    path = output / f"{kind}.lance"
    schema = next(_tables(dataset.select([0]))).schema
    batches = (batch for table in _tables(dataset) for batch in table.to_batches())
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(path))
    return [path]


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    """All columns block by block, the sketches in float32."""
    size: int = dataset.features["sketch"].length
    columns: Any = dataset.select_columns(_plain_columns(dataset)).with_format("arrow")
    for block in tqdm(row_blocks(dataset), desc="Exporting"):
        part = block.sketches
        flat = pa.array(part.reshape(-1).numpy())
        sketches = pa.FixedSizeListArray.from_arrays(flat, size)
        table = columns[block.start : block.start + len(part)]
        yield table.append_column("sketch", sketches).replace_schema_metadata()


def _to_npy(dataset: Dataset, output: Path, kind: str) -> list[Path]:
    paths: list[Path] = []
    for name in _plain_columns(dataset):
        paths.append(output / f"{kind}.{name}.npy")
        np.save(paths[-1], dataset.with_format("numpy")[name][:])
    paths.append(output / f"{kind}.sketch.npy")
    shape = (len(dataset), dataset.features["sketch"].length)
    rows = np.lib.format.open_memmap(
        paths[-1], mode="w+", dtype=np.float32, shape=shape
    )
    for block in tqdm(row_blocks(dataset), desc="Exporting"):
        rows[block.start : block.start + len(block.kept)] = block.sketches.numpy()
    rows.flush()
    return paths


def _to_safetensors(dataset: Dataset, output: Path, kind: str) -> list[Path]:
    paths: list[Path] = []
    for number, tensors in enumerate(_tensors(dataset)):
        paths.append(output / f"{kind}-{number:05d}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def _tensors(dataset: Dataset) -> Iterator[dict[str, Tensor]]:
    """Runs of rows, as a tensor of each column."""
    rows = max(1, _FILE_ELEMENTS // dataset.features["sketch"].length)
    for start in range(0, len(dataset), rows):
        part = dataset.select(range(start, min(start + rows, len(dataset))))
        columns = part.with_format("torch")
        tensors: dict[str, Any] = {n: columns[n][:] for n in _plain_columns(dataset)}
        yield {**tensors, "sketch": sketch_matrix(part)}


def _plain_columns(dataset: Dataset) -> list[str]:
    """All columns but the sketch and its scale."""
    return [name for name in dataset.column_names if name not in ("scale", "sketch")]


FORMATS: dict[str, Callable[[Dataset, Path, str], list[Path]]] = {
    "parquet": _to_parquet,
    "lance": _to_lance,
    "npy": _to_npy,
    "safetensors": _to_safetensors,
}
