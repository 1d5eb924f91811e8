"""Runs of blocks of a vector: their signs, and memory to work on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.sketches.transforms.signs import ROLES, RUN, StreamSigns, flip


@dataclass(frozen=True)
class Piece:
    """Some blocks of a vector.

    Args:
        low: first coordinate of the first block.
        high: one past the last coordinate, in the last block.
        places: (blocks,), the segment that each block is added to.
        masks: by role, runs of the blocks with their sign masks (blocks, block); None
            where no signs are flipped.
    """

    low: int
    high: int
    places: Tensor
    masks: dict[str, list[tuple[slice, Tensor]] | None]

    def flip(self, role: str, x: Tensor, out: Tensor) -> Tensor:
        """Flip signs of x (b, blocks, n), n at most the block, into `out`.

        A lazy device has no memory to spare by that: its result is a tensor of its own.
        """
        runs = self.masks[role]
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
        return x if self.masks[role] is None else self.flip(role, x, out=x)


class WorkingMemory:
    """Two buffers, kept from use to use.

    Memory that is given back and asked for again costs a page fault for each 4 KiB.
    """

    def __init__(self) -> None:
        self._buffers: Tensor | None = None

    def take(self, like: Tensor, elements: int) -> Tensor:
        """Two rows of at least so many elements, with what was left in them."""
        held = self._buffers
        if (
            held is None
            or held.shape[1] < elements
            or (held.dtype, held.device) != (like.dtype, like.device)
        ):
            held = self._buffers = like.new_empty(2, elements)
        return held


class BlockSigns:
    """The signs of a range of blocks of a stream.

    Args:
        seed: the user's seed.
        stream: whose signs.
        block: number of elements in a block.
        blocks: the first block and one past the last.
        before: whether there are signs before the transform, too.
        device: where the masks are wanted.
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        block: int,
        blocks: tuple[int, int],
        before: bool,
        device: torch.device,
    ) -> None:
        self._block = block
        self._device = device
        self._run = max(RUN, block)
        self._roles = {
            role: StreamSigns(seed, role, stream, self._run)
            for role in (ROLES if before else ROLES[1:])
        }
        first, end = blocks
        self._first_run = first * block // self._run
        runs = -(-end * block // self._run) - self._first_run
        self._offsets = {
            role: signs.offsets(self._first_run, runs)
            for role, signs in self._roles.items()
        }

    def masks(
        self, role: str, start: int, stop: int
    ) -> list[tuple[slice, Tensor]] | None:
        """Signs of blocks, run by run, with their places from `start` on."""
        if role not in self._roles:
            return None
        found: list[tuple[slice, Tensor]] = []
        per_run = self._run // self._block
        first = start
        while first < stop:
            last = min(stop, (first // per_run + 1) * per_run)
            masks = self._of_run(role, first, last)
            found.append((slice(first - start, last - start), masks))
            first = last
        return found

    def _of_run(self, role: str, first: int, last: int) -> Tensor:
        """Masks of blocks of one run: (last - first, block)."""
        low, count = first * self._block, (last - first) * self._block
        offset = self._offsets[role][low // self._run - self._first_run]
        signs = self._roles[role]
        masks = signs.masks(offset, low % self._run, count, self._device)
        return masks.view(last - first, self._block)
