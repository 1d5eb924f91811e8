"""Where each example pulls the model: the mean of its rows at unit length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.columns import EXAMPLE, row_groups
from hf_sketch.attribution.methods import Preconditioned
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.shares import RowShare

_NUMBERS_AT_ONCE = 2**25  # of directions, 128 MiB


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions of a store's examples, sorted by id and read in blocks.

    An example's direction is the mean of its rows, one per recorded epoch, each scaled
    to unit length first. Rows that are not finite count as 0.

    Shapes:
        ids (examples,); codes (rows,); counts (examples,)

    Args:
        dataset: the rows.
        ids: the examples, sorted.
        codes: the place in `ids` of each row's example.
        counts: rows of each example.
        shape: shape of a row: (out_size,), or (groups, out_size).
        at_once: examples per block.
    """

    dataset: Dataset
    ids: np.ndarray[Any, Any]
    codes: Tensor
    counts: Tensor
    shape: tuple[int, ...]
    at_once: int

    @classmethod
    def of_rows(cls, rows: SketchedRows) -> "Directions":
        """Return the directions of the examples that have rows here.

        Raises:
            ValueError: the rows belong to steps.
        """
        names = rows.dataset.column_names
        if EXAMPLE not in names:
            raise ValueError(
                f"Only rows of examples can be compared, got the columns {names}. Use "
                "the store itself instead of store.step_rows()."
            )
        groups = row_groups(rows.dataset, EXAMPLE)
        sketch = rows.model_sketch
        at_once = max(1, _NUMBERS_AT_ONCE // sketch.row_size)
        shape = tuple(sketch.layer_groups.shape)
        counts = torch.bincount(groups.codes, minlength=groups.count)
        return cls(rows.dataset, groups.values, groups.codes, counts, shape, at_once)

    @property
    def starts(self) -> range:
        """The first example of each block."""
        return range(0, len(self.ids), self.at_once)

    def rows(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the finite rows of the block from example `start` on, at unit length.

        Yields:
            the place in the block of each row's example, (n,), and the rows.
        """
        within = (self.codes >= start) & (self.codes < start + self.at_once)
        numbers = within.nonzero().squeeze(1)
        part = self.dataset
        if len(numbers) < len(part):
            part = part.select(numbers.numpy())
        codes = self.codes[numbers] - start
        for block in RowShare(part).blocks():
            unit = torch.nn.functional.normalize(block.sketches, dim=1)
            finite = unit.isfinite().all(1)
            here = codes[block.start : block.start + len(unit)]
            yield here[finite], unit[finite]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each block's slice of the examples and its directions (b, row_size)."""
        for start in self.starts:
            stop = min(start + self.at_once, len(self.ids))
            yield slice(start, stop), self.block(start)

    def block(self, start: int) -> Tensor:
        """Read the directions of the block from example `start` on, (b, row_size)."""
        stop = min(start + self.at_once, len(self.ids))
        total = torch.zeros(stop - start, int(np.prod(self.shape)))
        for here, unit in self.rows(start):
            total.index_add_(0, here, unit)
        return total / self.counts[start:stop].unsqueeze(1)

    def metric(self, damping: float) -> Preconditioned:
        """Return the inverse of C + damping * tr(C) / examples, C the mean of u u^T.

        u are the rows at unit length. The metric gives what many rows share less weight
        than what distinguishes them.

        Raises:
            ValueError: no row has a gradient.
        """
        products = torch.zeros(*self.shape, self.shape[-1], dtype=torch.float64)
        count = 0
        for block in RowShare(self.dataset).blocks():
            unit = torch.nn.functional.normalize(block.sketches, dim=1)
            unit = unit[unit.isfinite().all(1)]
            numbers = unit.unflatten(1, self.shape).movedim(0, -1)
            products += (numbers @ numbers.mT).double()
            count += len(unit)
        return Preconditioned(products / max(1, count), len(self.ids), damping)
