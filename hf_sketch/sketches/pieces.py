"""Runs of blocks of a vector: their signs, and memory to work on them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.operator import spans
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.sketches.transforms.signs import StreamSigns, flip


@dataclass(frozen=True)
class Piece:
    """Some blocks of a vector.

    Args:
        low: first coordinate of the first block.
        high: one past the last coordinate, in the last block.
        places: (blocks,), the segment that each block is added to.
        masks: for each role, runs of the blocks with their sign masks (blocks, block);
            roles in which no signs are flipped are left out.
    """

    low: int
    high: int
    places: Tensor
    masks: dict[str, list[tuple[slice, Tensor]]]

    def flip(self, role: str, x: Tensor, out: Tensor) -> Tensor:
        """Flip signs of x (b, blocks, n), n at most the block, into `out`.

        A lazy device has no memory to spare by that: its result is a tensor of its own.
        """
        runs = self.masks.get(role)
        if is_lazy(x):
            if runs is None:
                return x
            return flip(x, torch.cat([masks for _, masks in runs])[:, : x.shape[2]])
        if runs is None:
            return out.copy_(x)
        for blocks, masks in runs:
            flip(x[:, blocks], masks[:, : x.shape[2]], out=out[:, blocks])
        return out

    def flip_(self, role: str, x: Tensor) -> Tensor:
        """The same in place of x, which is not to be used any more."""
        return self.flip(role, x, out=x) if role in self.masks else x


class WorkingMemory:
    """Buffers that are kept from use to use.

    Memory that is given back and asked for again costs a page fault for each 4 KiB.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def take(self, like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Return buffers of the given sizes, with arbitrary content."""
        held, total = self._held, sum(sizes)
        if (
            held is None
            or len(held) < total
            or (held.dtype, held.device) != (like.dtype, like.device)
        ):
            held = self._held = like.new_empty(total)
        return held[:total].split(sizes)


class BlockSigns:
    """The signs of a range of blocks of a stream; their offsets are drawn once.

    Args:
        signs: signs of all blocks.
        block: number of elements in a block.
        first: the first block.
        end: one past the last.
        device: where the masks are wanted.
    """

    def __init__(
        self,
        signs: StreamSigns,
        block: int,
        first: int,
        end: int,
        device: torch.device,
    ) -> None:
        self._signs, self._block, self._device = signs, block, device
        self._first_run = first * block // signs.run
        runs = -(-end * block // signs.run) - self._first_run
        self._offsets = signs.offsets(self._first_run, runs)

    def masks(self, start: int, stop: int) -> list[tuple[slice, Tensor]]:
        """Signs of blocks, run by run, with their places from `start` on."""
        block, run = self._block, self._signs.run
        found: list[tuple[slice, Tensor]] = []
        first = start
        while first < stop:
            number, low = divmod(first * block, run)
            last = min(stop, (number + 1) * run // block)
            offset = self._offsets[number - self._first_run]
            count = (last - first) * block
            masks = self._signs.masks(offset, low, count, self._device)
            found.append((slice(first - start, last - start), masks.view(-1, block)))
            first = last
        return found


@dataclass(frozen=True, eq=False)
class DrawnBlocks:
    """What is random about a range of blocks.

    Args:
        block: number of elements in a block.
        first: the first block.
        signs: signs by role.
        places: (blocks,), the segment that each block is added to.
    """

    block: int
    first: int
    signs: Mapping[str, BlockSigns]
    places: Tensor

    def pieces(self, length: int, at_once: int) -> Iterator[Piece]:
        """Yield runs of at most `at_once` blocks, of `length` coordinates."""
        for low, high in spans(length, at_once * self.block):
            start, stop = low // self.block, -(-high // self.block)
            masks = {
                role: of.masks(self.first + start, self.first + stop)
                for role, of in self.signs.items()
            }
            yield Piece(low, high, self.places[start:stop], masks)
