"""Which program folds and rotates which parts of which matrices."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sketch.sketches.grouped import Grouped

_NUMBERS = 64  # of a group that one program sums
_MOST_GROUPS = 64
_FEWEST_MULTIPLIED = 16
_LEAST_ELEMENTS = 2**15  # of a program
_VECTOR = 8  # elements that one instruction may read


@dataclass(frozen=True)
class GroupedTensor:
    """A tensor that is sketched as a matrix, or one per expert.

    Args:
        place: its row in the table of addresses.
        operator: its sketch.
        group: number of its group of layers.
    """

    place: int
    operator: Grouped
    group: int


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
    elements = sum(of.operator.in_size for of in tensors)
    most = max(_LEAST_ELEMENTS, -(-elements // programs))
    shapes = tuple(dict.fromkeys(Shape.of(of.operator) for of in tensors))
    matrices, owners = _matrices(tensors)
    items: list[_Item] = []
    runs: list[tuple[int, ...]] = []
    rows = [0] * groups
    for group in range(groups):
        for number, shape in enumerate(shapes):
            own = [
                matrix
                for matrix, owner in enumerate(owners)
                if tensors[owner].group == group
                and Shape.of(tensors[owner].operator) == shape
            ]
            start = len(items)
            ends = list(_divide(matrices, own, shape, most, items))
            for row, (low, high) in enumerate(zip([start, *ends], ends, strict=False)):
                for p, q in _tiles(shape):
                    runs.append((low, high, number, p, q, rows[group] + row, group))
            rows[group] += len(ends)
    orders = [_orders(of.operator).unsqueeze(0) for of in tensors]
    return MatrixTables(
        torch.tensor(matrices, dtype=torch.int64),
        torch.tensor(items, dtype=torch.int64),
        torch.tensor(runs, dtype=torch.int64).view(-1, 7),
        torch.cat([torch.empty(0, 2, _MOST_GROUPS, dtype=torch.int32), *orders]),
        rows,
        tuple(map(tuple, shapes)),
        all(of.operator.sides[-1] % _VECTOR == 0 for of in tensors),
    )


def _tiles(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield the first p and q of each program that shares a matrix."""
    for p in range(0, shape.first, shape.p):
        for q in range(0, shape.second, shape.q):
            yield p, q


def _divide(
    matrices: Sequence[Sequence[int]],
    own: Sequence[int],
    shape: Shape,
    most: int,
    items: list[_Item],
) -> Iterator[int]:
    """Add the items of some matrices to `items`, and yield where a program's end."""
    tiles = sum(1 for _ in _tiles(shape))
    weight = 0
    for matrix in own:
        _, _, height, width, *_ = matrices[matrix]
        places = min(shape.groups, -(-height // shape.first))
        folds = -(-height // (shape.groups * shape.first))
        # Elements that a program reads of `at_once` places, in one fold.
        each = shape.at_once * shape.first * width // tiles
        some = shape.at_once * max(1, most // (each * folds))
        depth = max(1, min(folds, most // each))
        for first in range(0, places, some):
            for low in range(0, folds, depth):
                last, high = min(first + some, places), min(low + depth, folds)
                items.append(_Item(matrix, first, last, low, high))
                weight += each * (high - low) * -(-(last - first) // shape.at_once)
                if weight >= most:
                    yield len(items)
                    weight = 0
    if weight:
        yield len(items)


def _matrices(tensors: Sequence[GroupedTensor]) -> tuple[list[list[int]], list[int]]:
    """Return the rows of the table of matrices, and the tensor of each."""
    rows: list[list[int]] = []
    owners: list[int] = []
    for number, of in enumerate(tensors):
        *experts, height, width = of.operator.sides
        first, second = (of.operator.side_signs(side).keys for side in (0, 1))
        for expert in range(math.prod(experts)):
            start = expert * height * width
            left, right = expert * height, expert * width
            sides = *first, left, *second, right
            rows.append([of.place, start, height, width, *sides, number])
            owners.append(number)
    return rows, owners


def _orders(operator: Grouped) -> Tensor:
    """Return the rows of the Hadamard matrix that the groups of both sides have."""
    orders = torch.zeros(2, _MOST_GROUPS, dtype=torch.int32)
    for side in (0, 1):
        orders[side, : operator.kept] = operator.group_order(side)
    return orders
