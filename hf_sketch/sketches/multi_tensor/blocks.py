"""Which program adds up which blocks of which tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.srht import SRHT
from hf_sketch.sketches.transforms.mixing import mixing, square_factors

_TILE = 2**10
_LONGEST = 2**12  # what one program of four warps keeps in registers
_SHORTEST_LONG = 2**15  # the unit of `sum_long_blocks`, or more of these
_LONGEST_LONG = 2**18
_LEAST_ELEMENTS = 2**15  # of a program
_VECTOR = 8  # elements that one instruction may read


@dataclass(frozen=True)
class BlockedTensor:
    """A tensor that is sketched in blocks.

    Args:
        place: its row in the table of addresses.
        operator: its sketch.
        group: number of the sum that it belongs to.
        part: which of its elements are there.
        packed: whether it is a vector of small tensors, with zeros behind them.
    """

    place: int
    operator: BlockedSketch
    group: int
    part: range
    packed: bool = False

    def units(self, length: int) -> range:
        """Return the units of this length that have any of the elements."""
        return range(self.part.start // length, -(-self.part.stop // length))


@dataclass(frozen=True)
class BlockTables:
    """The tables of `sum_blocks` and of `sum_long_blocks`.

    Args:
        streams: (tensors, 5).
        units: (n, 2).
        runs: (programs, 5), whose rows of partial sums count from 0 in each group.
        rows: how many rows each group has.
        aligned: whether tensors have multiples of 8 elements.
    """

    streams: Tensor
    units: Tensor
    runs: Tensor
    rows: Sequence[int]
    aligned: bool

    def placed(self, starts: Tensor, device: torch.device) -> "BlockTables":
        """Return them on a device, with each group's rows from its start on."""
        runs = self.runs.clone()
        runs[:, 2] += starts[runs[:, 4]]
        streams, units = self.streams.to(device), self.units.to(device, torch.int32)
        runs = runs.to(device, torch.int32)
        return replace(self, streams=streams, units=units, runs=runs)


def adds_blocks(operator: BlockedSketch) -> bool:
    """Return whether a kernel adds up this operator's blocks."""
    if operator.block_size is None or operator.kind != "hadamard":
        return False
    if not isinstance(operator, SRHT):
        return operator.block <= _LONGEST_LONG
    if operator.block > _LONGEST:
        return False
    return operator.mixed_shape[0] == 1 or operator.block >= _TILE


def unit_of(tensors: Sequence[BlockedTensor]) -> int:
    """Return how many elements a program transforms at a time: blocks, or a longer."""
    longest = max(of.operator.block for of in tensors)
    short = isinstance(tensors[0].operator, SRHT)
    return max(_TILE if short else _SHORTEST_LONG, longest)


def block_tables(
    tensors: Sequence[BlockedTensor], groups: int, programs: int
) -> BlockTables:
    """Divide the blocks of all tensors among about `programs` programs.

    A program adds up blocks of one segment of one group, in order.
    """
    unit = unit_of(tensors) if tensors else _TILE
    spans = [of.units(unit) for of in tensors]
    most = max(1, _LEAST_ELEMENTS // unit, -(-sum(map(len, spans)) // programs))
    units = [torch.empty(0, 2, dtype=torch.int64)]
    runs: list[tuple[int, int, int, int, int]] = []
    rows = [0] * groups
    done = 0
    for group in dict.fromkeys(of.group for of in tensors):
        own = [place for place, of in enumerate(tensors) if of.group == group]
        found, ends = _by_segment(tensors, own, spans)
        units.append(found)
        first, low = 0, 0
        for high in ends:
            starts = range(low, high, most)
            for row, start in enumerate(starts):
                stop = min(start + most, high)
                runs.append((done + start, done + stop, row, first, group))
            rows[group] = max(rows[group], len(starts))
            first, low = first + tensors[own[0]].operator.block, high
        done += len(found)
    return BlockTables(
        torch.tensor([_stream(of) for of in tensors], dtype=torch.int64),
        torch.cat(units),
        torch.tensor(runs, dtype=torch.int64).view(-1, 5),
        rows,
        all(is_aligned(of.part) or of.packed for of in tensors),
    )


def is_aligned(part: range) -> bool:
    """Return whether a part of a tensor begins and ends at multiples of 8 elements."""
    return part.start % _VECTOR == part.stop % _VECTOR == 0


def _by_segment(
    tensors: Sequence[BlockedTensor], own: Sequence[int], spans: Sequence[range]
) -> tuple[Tensor, list[int]]:
    """Return a group's units by segment, (n, 2), and where each segment ends."""
    of = torch.cat([torch.full((len(spans[i]),), i) for i in own])
    unit = torch.cat([torch.arange(spans[i].start, spans[i].stop) for i in own])
    places = torch.cat(
        [tensors[i].operator.places(spans[i].start, spans[i].stop) for i in own]
    )
    segments = tensors[own[0]].operator.mixed_shape[0]
    order = places.argsort(stable=True)
    ends = places.bincount(minlength=segments).cumsum(0)
    return torch.stack([of, unit], 1)[order], ends.tolist()


def _stream(of: BlockedTensor) -> list[int]:
    before, after = (of.operator.signs(role).keys[:2] for role in ("before", "after"))
    return [of.place, *before, *after]


def long_factors(operator: BlockedSketch, unit: int) -> tuple[Tensor, Tensor]:
    """Return the transform of a unit of blocks: (3, 32, 32) and (leading, leading)."""
    drawn = operator.block, operator.seed, operator.permuted
    return square_factors(mixing("hadamard", *drawn), 3, unit // _SHORTEST_LONG)
