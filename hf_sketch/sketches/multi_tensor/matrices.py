"""Which program folds and rotates which parts of which matrices."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sketch.sketches.grouped import Grouped
from hf_sketch.sketches.multi_tensor.blocks import is_aligned

_NUMBERS = 64  # of a group that one program sums
_MOST_GROUPS = 64
_FEWEST_MULTIPLIED = 16
_LEAST_ELEMENTS = 2**15  # of a program


@dataclass(frozen=True)
class GroupedTensor:
    """A tensor that is sketched as a matrix, or one per expert.

    Args:
        place: its row in the table of addresses.
        operator: its sketch.
        group: number of its group of layers.
        part: which of its elements are there.
    """

    place: int
    operator: Grouped
    group: int
    part: range


class Shape(NamedTuple):
    """What a program is compiled for.

    Args:
        groups: r of `Grouped`.
        first: s_1.
        second: s_2.
        p: how many numbers of the first side a program sums.
        q: how many of the second.
        at_once: how many places c it folds at a time.
        kept: groups in the sketch.
        padded: groups, or the fewest that are multiplied.
        scale: scale of the sums.
    """

    groups: int
    first: int
    second: int
    p: int
    q: int
    at_once: int
    kept: int
    padded: int
    scale: float

    @classmethod
    def of(cls, operator: Grouped) -> "Shape":
        """Return that of an operator."""
        first, second = operator.group_sizes
        q = min(second, _NUMBERS)
        p = min(first, _NUMBERS // q)
        padded = max(operator.groups, _FEWEST_MULTIPLIED)
        sizes = operator.groups, first, second, p, q, _NUMBERS // (p * q)
        return cls(*sizes, operator.kept, padded, operator.kept**-0.5)


@dataclass(frozen=True)
class MatrixTables:
    """The tables of `sum_matrices`.

    Args:
        matrices: (n, 11).
        items: (n, 5).
        runs: (programs, 7), whose rows of partial sums count from 0 in each group.
        orders: (tensors, 2, 64).
        rows: how many rows each group has.
        shapes: what programs are compiled for.
        aligned: whether rows of matrices have multiples of 8 elements.
    """

    matrices: Tensor
    items: Tensor
    runs: Tensor
    orders: Tensor
    rows: Sequence[int]
    shapes: tuple[tuple[float, ...], ...]
    aligned: bool

    def placed(self, starts: Tensor, device: torch.device) -> "MatrixTables":
        """Return them on a device, with each group's rows from its start on."""
        runs = self.runs.clone()
        runs[:, 5] += starts[runs[:, 6]]
        matrices, orders = self.matrices.to(device), self.orders.to(device)
        items, runs = (x.to(device, torch.int32) for x in (self.items, runs))
        return replace(self, matrices=matrices, orders=orders, items=items, runs=runs)


class _Matrix(NamedTuple):
    """A matrix that is a tensor or one of its experts.

    Args:
        of: the tensor.
        row: what the table of matrices says of it.
        lines: which of its rows are there.
        width: its columns.
    """

    of: GroupedTensor
    row: Sequence[int]
    lines: range
    width: int


class _Item(NamedTuple):
    """A range of places c of a matrix, and of the folds of its rows."""

    matrix: int
    first: int
    last: int
    low: int
    high: int


def folds_matrices(operator: Grouped) -> bool:
    """Return whether `sum_matrices` is for this operator."""
    return operator.groups <= _MOST_GROUPS


def matrix_tables(
    tensors: Sequence[GroupedTensor], groups: int, programs: int
) -> MatrixTables:
    """Divide the matrices of all tensors among about `programs` programs.

    A program sums some of the numbers of matrices of one shape and group, in order.
    """
    elements = sum(len(of.part) for of in tensors)
    most = max(_LEAST_ELEMENTS, -(-elements // programs))
    shapes = tuple(dict.fromkeys(Shape.of(of.operator) for of in tensors))
    matrices = [*_matrices(tensors)]
    items: list[_Item] = []
    runs: list[tuple[int, ...]] = []
    rows = [0] * groups
    for group in range(groups):
        for number, shape in enumerate(shapes):
            own = {
                place: matrix
                for place, matrix in enumerate(matrices)
                if matrix.of.group == group and Shape.of(matrix.of.operator) == shape
            }
            start = len(items)
            ends = list(_divide(own, shape, most, items))
            for row, (low, high) in enumerate(zip([start, *ends], ends, strict=False)):
                for p, q in _tiles(shape):
                    runs.append((low, high, number, p, q, rows[group] + row, group))
            rows[group] += len(ends)
    orders = [_orders(of.operator).unsqueeze(0) for of in tensors]
    return MatrixTables(
        torch.tensor([x.row for x in matrices], dtype=torch.int64),
        torch.tensor(items, dtype=torch.int64),
        torch.tensor(runs, dtype=torch.int64).view(-1, 7),
        torch.cat([torch.empty(0, 2, _MOST_GROUPS, dtype=torch.int32), *orders]),
        rows,
        tuple(map(tuple, shapes)),
        all(
            is_aligned(range(of.operator.sides[-1])) and is_aligned(of.part)
            for of in tensors
        ),
    )


def _tiles(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield the first p and q of each program that shares a matrix."""
    for p in range(0, shape.first, shape.p):
        for q in range(0, shape.second, shape.q):
            yield p, q


def _divide(
    own: Mapping[int, _Matrix], shape: Shape, most: int, items: list[_Item]
) -> Iterator[int]:
    """Add the items of some matrices to `items`, and yield where a program's end.

    Args:
        own: matrices of one shape, by their rows of the table.
        shape: shape of all.
        most: elements that a program reads, about.
        items: items of the matrices before.
    """
    tiles = sum(1 for _ in _tiles(shape))
    weight = 0
    for matrix, of in own.items():
        places, folds = _spans(of.lines, shape)
        # Elements that a program reads of `at_once` places, in one fold.
        each = shape.at_once * shape.first * of.width // tiles
        some = shape.at_once * max(1, most // (each * len(folds)))
        depth = max(1, min(len(folds), most // each))
        for first in places[::some]:
            for low in folds[::depth]:
                last = min(first + some, places.stop)
                high = min(low + depth, folds.stop)
                items.append(_Item(matrix, first, last, low, high))
                weight += each * (high - low) * -(-(last - first) // shape.at_once)
                if weight >= most:
                    yield len(items)
                    weight = 0
    if weight:
        yield len(items)


def _spans(lines: range, shape: Shape) -> tuple[range, range]:
    """Return the places c and the folds that have any of some rows of a matrix."""
    height = shape.groups * shape.first
    folds = range(lines.start // height, -(-lines.stop // height))
    if len(folds) > 1:
        return range(shape.groups), folds
    above = folds.start * height
    first, last = lines.start - above, lines.stop - above
    return range(first // shape.first, -(-last // shape.first)), folds


def _matrices(tensors: Sequence[GroupedTensor]) -> Iterator[_Matrix]:
    """Yield all matrices of which there are any rows."""
    for number, of in enumerate(tensors):
        *experts, height, width = of.operator.sides
        first, second = (of.operator.side_signs(side).keys for side in (0, 1))
        for expert in range(math.prod(experts)):
            start = expert * height * width
            low = max(0, (of.part.start - start) // width)
            lines = range(low, min(height, -(-(of.part.stop - start) // width)))
            left, right = expert * height, expert * width
            sides = *first, left, *second, right
            row = of.place, start, height, width, *sides, number
            if lines:
                yield _Matrix(of, row, lines, width)


def _orders(operator: Grouped) -> Tensor:
    """Return the rows of the Hadamard matrix that the groups of both sides have."""
    orders = torch.zeros(2, _MOST_GROUPS, dtype=torch.int32)
    for side in (0, 1):
        orders[side, : operator.kept] = operator.group_order(side)
    return orders
