"""Sketches on disk: a JSON header, a manifest and Arrow shards; see docs/format.md."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Features, List, Value
from torch import Tensor

from hf_sketch.measured_error import MeasuredError
from hf_sketch.model_sketch import ModelSketch

FORMAT_VERSION = 1
HEADER = "header.json"
MANIFEST = "manifest.json"
PER_EXAMPLE = "per_example"
PER_STEP = "per_step"
QUERY = "query"
_CHECK_TOLERANCE = 1e-4

_COLUMNS = {
    PER_EXAMPLE: {
        "example_id": "int64",
        "epoch": "int32",
        "step": "int32",
        "micro_step": "int32",
        "rank": "int32",
        "learning_rate": "float64",
        "loss": "float32",
        "weight": "float64",
        "gradient_norm": "float32",
        "finite": "bool",
    },
    PER_STEP: {
        "epoch": "int32",
        "step": "int32",
        "learning_rate": "float64",
        "gradient_norm": "float64",
        "clip_factor": "float64",
        "finite": "bool",
    },
    QUERY: {
        "example_id": "int64",
        "loss": "float32",
        "gradient_norm": "float32",
        "finite": "bool",
    },
}


@dataclass(frozen=True)
class Shard:
    """One Arrow file of the store, as the manifest lists it.

    Args:
        file: its name within the store's directory.
        kind: "per_example" or "per_step".
        rows: how many rows it holds.
        first_step: the least optimizer step among them, counted from 1.
        last_step: the greatest.
        size_bytes: the file's length.
        sha256: the file's digest, in hexadecimal.
    """

    file: str
    kind: str
    rows: int
    first_step: int
    last_step: int
    size_bytes: int
    sha256: str


def features(kind: str, out_size: int) -> Features:
    """The columns of a kind of rows, with the sketch as a fixed-size list."""
    columns = {name: Value(dtype) for name, dtype in _COLUMNS[kind].items()}
    return Features(**columns, sketch=List(Value("float32"), length=out_size))


def arrow_table(kind: str, columns: Mapping[str, Tensor]) -> pa.Table:
    """Rows as an Arrow table; `sketch` is (rows, out_size), the others (rows,)."""
    out_size = columns["sketch"].shape[1]
    schema = features(kind, out_size).arrow_schema
    arrays = [
        pa.array(columns[name].cpu().numpy()).cast(schema.field(name).type)
        for name in _COLUMNS[kind]
    ]
    flat = columns["sketch"].to(torch.float32).cpu().reshape(-1).numpy()
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), out_size))
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class Header:
    """What the store's header says of its rows.

    Args:
        model_sketch: the map that made them.
        loss: an example's own loss: the "mean" or the "sum" over its tokens.
        measured_error: of their inner products, if it was measured.
    """

    model_sketch: ModelSketch
    loss: str
    measured_error: MeasuredError | None


def read_header(directory: Path) -> Header:
    """The store's header, its map checked against its probe.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the header cannot be read, has another version, or describes a map
            that this installation computes differently.
    """
    header = _read_json(directory / HEADER)
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / HEADER} must have format_version {FORMAT_VERSION}, got "
            f"{header.get('format_version')!r}: open it with the hf_sketch that wrote "
            "it."
        )
    model_sketch = ModelSketch.from_dict(header["model_sketch"])
    ours = torch.tensor(model_sketch.check_value())
    theirs = torch.tensor(header["check_value"])
    if not torch.allclose(ours, theirs, rtol=_CHECK_TOLERANCE, atol=_CHECK_TOLERANCE):
        raise ValueError(
            f"the check value in {directory / HEADER} starts with "
            f"{header['check_value'][0]:.6g}, this installation computes "
            f"{float(ours[0]):.6g}: open the store with the hf_sketch that wrote it."
        )
    error = header["measured_error"]
    measured = None if error is None else MeasuredError(**error)
    return Header(model_sketch, header["loss"], measured)


def write_measured_error(directory: Path, error: MeasuredError) -> None:
    """Put the rows' measured error into the header, in one step."""
    header = {**_read_json(directory / HEADER), "measured_error": vars(error)}
    _replace_file(directory / HEADER, json.dumps(header, indent=1).encode())


def read_manifest(directory: Path) -> list[Shard]:
    """The shards of the store, in the order in which they were written.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the manifest cannot be read.
    """
    manifest = _read_json(directory / MANIFEST)
    return [Shard(**entry) for entry in manifest["shards"]]


def create_store(directory: Path, model_sketch: ModelSketch, loss: str) -> None:
    """Write the header and an empty manifest.

    Raises:
        OSError: the directory cannot be written.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "model_sketch": model_sketch.to_dict(),
        "units": "a row is the gradient of the example's own loss; the sum of weight *"
        " row over a step's examples is the step's gradient before clipping",
        "loss": loss,
        "measured_error": None,
        "check_value": model_sketch.check_value(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace_file(directory / HEADER, json.dumps(header, indent=1).encode())
        write_manifest(directory, [])
    except OSError as error:
        raise OSError(
            error.errno,
            f"the sketches cannot be written to {directory} ({error.strerror}): "
            "give the Trainer an output_dir that can be written",
        ) from error


def write_manifest(directory: Path, shards: list[Shard]) -> None:
    """Replace the list of shards in one step: readers see the old or the new one."""
    manifest = {"shards": [vars(shard) for shard in shards]}
    _replace_file(directory / MANIFEST, json.dumps(manifest, indent=1).encode())


def write_shard(directory: Path, kind: str, number: int, table: pa.Table) -> Shard:
    """Write rows as one Arrow file, complete and synced before it gets its name."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = memoryview(sink.getvalue())
    path = directory / f"{kind}-{number:06d}.arrow"
    _replace_file(path, data)
    steps = table["step"].to_numpy()
    return Shard(
        file=path.name,
        kind=kind,
        rows=table.num_rows,
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        size_bytes=data.nbytes,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_shard(directory: Path, shard: Shard) -> pa.Table:
    """The shard's rows, memory-mapped.

    Raises:
        ValueError: the file is missing or shorter than the manifest says.
    """
    check_shard(directory, shard)
    with pa.memory_map(str(directory / shard.file)) as source:
        return pa.ipc.open_stream(source).read_all()


def check_shard(directory: Path, shard: Shard) -> None:
    """Raise ValueError unless the shard's file is there with its full length."""
    path = directory / shard.file
    size = path.stat().st_size if path.exists() else None
    if size != shard.size_bytes:
        got = "no such file" if size is None else f"{size} bytes"
        raise ValueError(
            f"{path} must have {shard.size_bytes} bytes, got {got}: restore the file, "
            "or read the others with load_sketches(..., skip_damaged=True)."
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file of the store."""
    if not path.exists():
        raise FileNotFoundError(
            f"no sketches at {path.parent}: give the Trainer's output_dir, or its "
            "'sketches' directory, of a run with GradientSketchCallback."
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): restore the file."
        ) from error


def _replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that its name never stands for half of it, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - the call's name is its promise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
