"""How the work on many tensors is divided among programs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.multi_tensor.blocks import (
    BlockedTensor,
    BlockTables,
    block_tables,
    long_factors,
    unit_of,
)
from hf_sketch.sketches.multi_tensor.finishing import as_it_is, finish_of
from hf_sketch.sketches.multi_tensor.matrices import (
    GroupedTensor,
    MatrixTables,
    matrix_tables,
)
from hf_sketch.sketches.multi_tensor.row_tables import (
    PartialSum,
    RowTables,
    aligned,
    row_tables,
)
from hf_sketch.sketches.srht import SRHT
from hf_sketch.sketches.transforms.fused import whole_factors

CHUNK: Final = 2**10  # elements that a program copies or finishes
_NOWHERE: Final = -1
# About, per kernel: constants, so that sums have one order.
_PROGRAMS: Final = 2**10
_LONG_PROGRAMS: Final = 2**7  # each has memory for two units
LONG_WARPS: Final = 8  # of each of those


@dataclass(frozen=True)
class GradientTensors:
    """How a gradient's tensors are sketched.

    Args:
        parts: which elements of each tensor are there, in order: all, or a shard's.
        blocked: tensors that are sketched in blocks, by operators of one kind, and
            packed vectors, whose places come after those of the tensors.
        grouped: tensors that are sketched as matrices.
        packed: where others go among the packed vectors, which lie end to end.
        packed_sizes: elements of each packed vector, multiples of 1024.
        out_size: numbers per group of layers.
        groups: groups of layers.
        scales: factors of rows and of columns, of each tensor and packed vector, that
            its elements are multiplied by; none if they are not.
    """

    parts: Sequence[range]
    blocked: Sequence[BlockedTensor]
    grouped: Sequence[GroupedTensor]
    packed: Mapping[int, int]
    packed_sizes: Sequence[int]
    out_size: int
    groups: int
    scales: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(frozen=True)
class Division:
    """The programs' tables, on a device.

    Args:
        blocks: tables of `sum_blocks`, or of `sum_long_blocks`.
        matrices: tables of `sum_matrices`.
        rows: tables of `add_rows` and `finish_row`.
        transform: the factors of the transform of blocks, and the leading ones.
        long: a tensor of each sum of long blocks, by group and block.
        unit: numbers of such a partial sum; 0 if blocks are short.
        whole: numbers of the partial sums that are as long as the sketch.
        partial: numbers of all partial sums, which come after those.
    """

    blocks: BlockTables
    matrices: MatrixTables
    rows: RowTables
    transform: tuple[Tensor, Tensor]
    long: Sequence[BlockedTensor]
    unit: int
    whole: int
    partial: int


def divide(of: GradientTensors, device: torch.device) -> Division:
    """Make the programs' tables, and give each program a row of partial sums."""
    long = _by_transform(of.blocked)
    tensors = of.blocked
    if long:
        parts = enumerate(long.values())
        tensors = [replace(x, group=number) for number, held in parts for x in held]
    programs = _LONG_PROGRAMS if long else _PROGRAMS
    blocks = block_tables(tensors, len(long) or of.groups, programs)
    matrices = matrix_tables(of.grouped, of.groups, _PROGRAMS)
    own = torch.tensor([0] * of.groups if long else blocks.rows)
    starts = _starts(own + torch.tensor(matrices.rows))
    sums = _whole_sums(starts.tolist(), of.out_size)
    matrices = matrices.placed(starts[:-1] + own, device)
    whole = partial = aligned(int(starts[-1]) * of.out_size)
    unit = 0
    if long:
        unit, starts = unit_of(tensors), _starts(torch.tensor(blocks.rows))
        partial += int(starts[-1]) * unit
        sums += _long_sums(long, [whole + unit * x for x in starts.tolist()])
    return Division(
        blocks.placed(starts[:-1], device),
        matrices,
        row_tables(sorted(sums, key=lambda of: of.group), of.groups, device),
        _transform(tensors, [held[0].operator for held in long.values()], device),
        [held[0] for held in long.values()],
        unit,
        whole,
        partial,
    )


def _by_transform(
    tensors: Sequence[BlockedTensor],
) -> dict[tuple[int, int], list[BlockedTensor]]:
    """Return those with long blocks that may be added up, by group and block."""
    found: dict[tuple[int, int], list[BlockedTensor]] = {}
    for of in tensors:
        if not isinstance(of.operator, SRHT):
            found.setdefault((of.group, of.operator.block), []).append(of)
    return found


def _starts(counts: Tensor) -> Tensor:
    """Return where each of some ranges begins, and where the last one ends."""
    return torch.nn.functional.pad(counts.to(torch.int64).cumsum(0), (1, 0))


def _whole_sums(starts: Sequence[int], width: int) -> list[PartialSum]:
    """Return each group's sum of rows that are as long as the sketch."""
    finish = as_it_is(width)
    return [
        PartialSum(group, start * width, end - start, width, width, finish)
        for group, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def _long_sums(
    long: Mapping[tuple[int, int], Sequence[BlockedTensor]],
    starts: Sequence[int],
) -> list[PartialSum]:
    """Return the sums of long blocks, which are several to a row if they are short."""
    sums: list[PartialSum] = []
    for ((group, block), held), (start, end) in zip(
        long.items(), itertools.pairwise(starts), strict=True
    ):
        operator = held[0].operator
        width = operator.mixed_shape[1]
        rows = start, (end - start) // block, block, width
        sums.append(PartialSum(group, *rows, finish_of(operator)))
    return sums


def _transform(
    tensors: Sequence[BlockedTensor],
    long: Sequence[BlockedSketch],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the factors of blocks, or of each sum of long ones."""
    if not tensors:
        return torch.empty(0), torch.empty(0)
    if not long:
        return whole_factors(tensors[0].operator, device)
    found = [long_factors(operator, unit_of(tensors)) for operator in long]
    factors, leading = (
        torch.stack(parts).to(device) for parts in zip(*found, strict=True)
    )
    return factors, leading


def witness_chunks(of: GradientTensors, each: int) -> list[tuple[int, int, int, int]]:
    """Return chunks of each tensor's first elements, which are copied nowhere."""
    return [
        (place, start, count, _NOWHERE)
        for place, part in enumerate(of.parts)
        for start, count in _chunks(part[:each])
    ]


def packed_chunks(of: GradientTensors) -> list[tuple[int, int, int, int]]:
    """Return chunks of the small tensors, and where they are copied to."""
    return [
        (place, start, count, to + start)
        for place, to in of.packed.items()
        for start, count in _chunks(of.parts[place])
    ]


def _chunks(part: range) -> Iterator[tuple[int, int]]:
    """Yield the first element of each chunk, and how many it has."""
    for start in part[::CHUNK]:
        yield start, min(CHUNK, part.stop - start)


def scale_tables(of: GradientTensors, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table of scales, (tensors and packed vectors, 3), and all factors.

    The table has their addresses, so that they must live as long.
    """
    sides = [side for both in of.scales for side in both]
    starts = _starts(torch.tensor([len(side) for side in sides], dtype=torch.int64))
    widths = torch.tensor([len(x) for _, x in of.scales], dtype=torch.int64)
    factors = torch.cat([torch.empty(0), *sides]).to(device)
    places = starts * factors.element_size() + factors.data_ptr()
    table = torch.stack([places[:-1:2], places[1::2], widths], 1)
    return table.to(device), factors


def table_keys(operator: BlockedSketch) -> tuple[int, ...]:
    """Return the keys of the signs that all streams share."""
    return *operator.signs("before").keys[2:], *operator.signs("after").keys[2:]
