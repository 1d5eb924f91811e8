"""Which partial sums are added up, and what becomes of the sums."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.multi_tensor.finishing import Finish

_COLUMNS = 32  # numbers that a program adds up
_ALIGNED = 32  # numbers, so that vectors are read of what follows


@dataclass(frozen=True)
class PartialSum:
    """Rows of partial sums that are added up.

    Args:
        group: number of the group of layers that the sum belongs to.
        start: where in the memory of partial sums the first row begins.
        rows: how many rows.
        stride: how far they lie apart.
        width: numbers of each that are added up.
        finish: what becomes of the sum.
    """

    group: int
    start: int
    rows: int
    stride: int
    width: int
    finish: Finish


@dataclass(frozen=True)
class RowTables:
    """The tables of `add_rows` and of `finish_row`.

    Args:
        parts: (programs, 2).
        sums: (n, 6).
        terms: (n, 7).
        ranges: (groups, 2).
        places: where numbers of all terms are in the sums, end to end.
        weights: what they are multiplied by.
        magnitudes: what sums are multiplied by, end to end.
        factors: what tiles are multiplied by, end to end.
        length: numbers of all sums.
        rotates: whether there are any factors.
    """

    parts: Tensor
    sums: Tensor
    terms: Tensor
    ranges: Tensor
    places: Tensor
    weights: Tensor
    magnitudes: Tensor
    factors: Tensor
    length: int
    rotates: bool


def row_tables(
    sums: Sequence[PartialSum], groups: int, device: torch.device
) -> RowTables:
    """Return the tables for some sums, those of a group one after the other."""
    rows: list[list[int]] = []
    terms: list[list[int]] = []
    places, weights, magnitudes, factors = (_Joined() for _ in range(4))
    length = 0
    for of in sums:
        finish = of.finish
        drawn = magnitudes.add(finish.magnitudes)
        rows.append([of.start, of.rows, of.stride, of.width, drawn, length])
        numbers = length, finish.length, finish.stride, finish.places.shape[1]
        tables = places.add(finish.places), weights.add(finish.weights)
        terms.append([*numbers, *tables, factors.add(finish.factors)])
        length += aligned(of.width)
    ends = [sum(of.group < group for of in sums) for group in range(groups + 1)]
    parts = [
        (number, low)
        for number, of in enumerate(sums)
        for low in range(0, of.width, _COLUMNS)
    ]
    return RowTables(
        torch.tensor(parts).to(device, torch.int32),
        torch.tensor(rows).to(device),
        torch.tensor(terms).to(device),
        torch.tensor([*itertools.pairwise(ends)]).to(device, torch.int32),
        places.joined(device).to(torch.int64),
        weights.joined(device),
        magnitudes.joined(device),
        factors.joined(device),
        length,
        any(of.finish.factors is not None for of in sums),
    )


def aligned(length: int) -> int:
    """Return a length, rounded up."""
    return -(-length // _ALIGNED) * _ALIGNED


class _Joined:
    """Tables end to end, equal ones once."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._starts: list[int] = []
        self._end = 0

    def add(self, part: Tensor | None) -> int:
        """Return where a table is among the others, or -1 without one."""
        if part is None:
            return -1
        for start, known in zip(self._starts, self._parts, strict=True):
            if known.shape == part.shape and torch.equal(known, part):
                return start
        self._parts.append(part)
        self._starts.append(self._end)
        self._end += part.numel()
        return self._starts[-1]

    def joined(self, device: torch.device) -> Tensor:
        """Return all of them on a device: one number at least."""
        parts = [part.flatten() for part in self._parts] or [torch.zeros(1)]
        return torch.cat(parts).contiguous().to(device)
