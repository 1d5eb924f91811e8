"""Rows of a store, block by block, straight from the mapped files."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

_BLOCK_ELEMENTS = 2**22
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Consecutive rows of a dataset.

    Shapes:
        kept (rows, out_size), float32, overwritten by the next block; scale (rows,),
            both on the device that was asked for

    Args:
        start: number of the first row.
        kept: the stored sketches, to be multiplied by `scale`.
        scale: scale of each row.
        columns: the requested columns that exist, (rows,) each, on the CPU.
    """

    start: int
    kept: Tensor
    scale: Tensor
    columns: dict[str, Tensor]

    @property
    def sketches(self) -> Tensor:
        """The sketches, (rows, out_size), in memory of their own."""
        return self.kept * self.scale.unsqueeze(1)


def block_rows(dataset: Dataset) -> int:
    """Return the number of rows per block, except the last."""
    return max(1, _BLOCK_ELEMENTS // dataset.features["sketch"].length)


def row_blocks(
    dataset: Dataset,
    *names: str,
    start: int = 0,
    device: torch.device = CPU,
) -> Iterator[RowBlock]:
    """Yield all rows in order; memory does not grow with their number.

    An accelerator gets them as they are stored, through pinned memory.

    Args:
        dataset: the rows.
        names: columns of numbers to read beside the sketches, if they exist.
        start: number of the first row.
        device: where the sketches and their scales are needed.
    """
    present = [name for name in ("scale", *names) if name in dataset.column_names]
    arrow = formatted(dataset, "arrow", [*present, "sketch"])
    out_size: int = dataset.features["sketch"].length
    memory = torch.empty(
        block_rows(dataset),
        out_size,
        dtype=torch.float32 if device == CPU else _dtype(dataset),
        pin_memory=device != CPU,
    )
    table: Any
    for table in arrow.iter(len(memory)):
        kept = memory[: table.num_rows]
        low = 0
        for chunk in table["sketch"].chunks:
            part = torch.from_dlpack(chunk.flatten()).view(-1, out_size)
            kept[low : low + len(part)] = part
            low += len(part)
        kept = kept.to(device).float()
        columns = {name: _numbers(table[name]) for name in present}
        scale = columns.pop("scale", torch.ones(len(kept))).to(device)
        if scale.dim() == 2:  # of each group of layers
            kept.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(2))
            scale = torch.ones(len(kept), device=device)
        yield RowBlock(start, kept, scale, columns)
        start += len(kept)


def _dtype(dataset: Dataset) -> torch.dtype:
    return getattr(torch, dataset.features["sketch"].feature.dtype)


def _numbers(column: pa.ChunkedArray) -> Tensor:
    """A column of numbers, (rows,), or of lists of equally many, (rows, n)."""
    if not pa.types.is_fixed_size_list(column.type):
        return torch.tensor(column.to_numpy())
    flat = column.combine_chunks().flatten()
    return torch.tensor(flat.to_numpy()).view(len(column), -1)


def formatted(dataset: Dataset, kind: str, names: Sequence[str]) -> Dataset:
    """Return columns of a dataset in another format, sharing its file list.

    Copying that list, as `with_format` and `select_columns` do, takes as long as
    scoring some hundred rows of each file.
    """
    view = copy.copy(dataset)
    view.set_format(kind, columns=[*names])
    return view


def sketch_matrix(dataset: Dataset) -> Tensor:
    """Return the sketches of a small dataset, (rows, out_size), float32."""
    none = torch.empty(0, dataset.features["sketch"].length)
    return torch.cat([none, *(block.sketches for block in row_blocks(dataset))])
