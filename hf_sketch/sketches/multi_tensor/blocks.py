"""Which program adds up which blocks of which tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sketch.sketches.srht import SRHT

_TILE = 1024
_LONGEST = 4 * _TILE  # what one program of four warps keeps in registers
_LEAST_UNITS = 32  # of a program
_VECTOR = 8  # elements that one instruction may read


@dataclass(frozen=True)
class BlockedTensor:
    """A tensor that is sketched in blocks.

    Args:
        place: its row in the table of addresses.
        operator: its sketch.
        group: number of its group of layers.
        packed: whether it is a vector of small tensors, with zeros behind them.
    """

    place: int
    operator: SRHT
    group: int
    packed: bool = False


@dataclass(frozen=True)
class BlockTables:
    """The tables of `sum_blocks`.

    Args:
        streams: (tensors, 5).
        units: (n, 2).
        runs: (programs, 4), whose rows of partial sums count from 0 in each group.
        groups: (programs,), the group of each.
        rows: how many rows each group has.
        aligned: whether tensors have multiples of 8 elements.
    """

    streams: Tensor
    units: Tensor
    runs: Tensor
    groups: Tensor
    rows: Sequence[int]
    aligned: bool

    def placed(self, starts: Tensor, device: torch.device) -> "BlockTables":
        """Return them on a device, with each group's rows from its start on."""
        runs = self.runs.clone()
        runs[:, 2] += starts[self.groups]
        streams, units = self.streams.to(device), self.units.to(device, torch.int32)
        runs = runs.to(device, torch.int32)
        return replace(self, streams=streams, units=units, runs=runs)


def adds_blocks(operator: SRHT) -> bool:
    """Return whether `sum_blocks` is for this operator."""
    if operator.block_size is None or operator.block > _LONGEST:
        return False
    return operator.mixed_shape[0] == 1 or operator.block >= _TILE


def block_tables(
    tensors: Sequence[BlockedTensor], groups: int, programs: int
) -> BlockTables:
    """Divide the blocks of all tensors among about `programs` programs.

    A program adds up blocks of one segment of one group, in order.
    """
    counts = [-(-of.operator.in_size // _unit(of.operator)) for of in tensors]
    most = max(_LEAST_UNITS, -(-sum(counts) // programs))
    units = [torch.empty(0, 2, dtype=torch.int64)]
    runs: list[tuple[int, int, int, int]] = []
    group_of: list[int] = []
    rows = [0] * groups
    done = 0
    for group in dict.fromkeys(of.group for of in tensors):
        own = [place for place, of in enumerate(tensors) if of.group == group]
        found, ends = _by_segment(tensors, own, counts)
        units.append(found)
        first, low = 0, 0
        for high in ends:
            starts = range(low, high, most)
            for row, start in enumerate(starts):
                stop = min(start + most, high)
                runs.append((done + start, done + stop, row, first))
                group_of.append(group)
            rows[group] = max(rows[group], len(starts))
            first, low = first + tensors[0].operator.block, high
        done += len(found)
    return BlockTables(
        torch.tensor([_stream(of) for of in tensors], dtype=torch.int64),
        torch.cat(units),
        torch.tensor(runs, dtype=torch.int64).view(-1, 4),
        torch.tensor(group_of, dtype=torch.int64),
        rows,
        all(of.operator.in_size % _VECTOR == 0 or of.packed for of in tensors),
    )


def _unit(operator: SRHT) -> int:
    return max(_TILE, operator.block)


def _by_segment(
    tensors: Sequence[BlockedTensor], own: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Return a group's units by segment, (n, 2), and where each segment ends."""
    of = torch.cat([torch.full((counts[i],), i) for i in own])
    unit = torch.cat([torch.arange(counts[i]) for i in own])
    places = torch.cat([tensors[i].operator.places(0, counts[i]) for i in own])
    segments = tensors[own[0]].operator.mixed_shape[0]
    order = places.argsort(stable=True)
    ends = places.bincount(minlength=segments).cumsum(0)
    return torch.stack([of, unit], 1)[order], ends.tolist()


def _stream(of: BlockedTensor) -> list[int]:
    before, after = (of.operator.signs(role).keys[:2] for role in ("before", "after"))
    return [of.place, *before, *after]
