"""Operators that transform blocks, flip signs before and after, and add them up."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hf_sketch.sketches.choices import check_choice
from hf_sketch.sketches.operator import SeededSketch, fitting, next_power_of_two, spans
from hf_sketch.sketches.outer import form_outer, is_touched
from hf_sketch.sketches.pieces import BlockSigns, DrawnBlocks, Piece, WorkingMemory
from hf_sketch.sketches.transforms.fused import accumulate_fused, can_fuse
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.sketches.transforms.mixing import (
    MIXES,
    Mix,
    Mixing,
    Permuted,
    mix_adjoint,
    mix_rows,
    mixing,
)
from hf_sketch.sketches.transforms.random import CounterRandom, drawing
from hf_sketch.sketches.transforms.signs import (
    ROLES,
    RUN,
    StreamSigns,
    flip,
    sign_masks,
)
from hf_sketch.sketches.variances.moments import Moments, moments

_KEPT_ELEMENTS = 2**20  # of a short vector


@dataclass(frozen=True)
class BlockedSketch(SeededSketch):
    """S x = finish(sum_b signs'_b * H (signs_b * x_b)) over blocks x_b of x.

    Both sign vectors are fresh for each block and stream; the first rows of a
    transform, H, and `finish` are shared. Different blocks are then uncorrelated for
    every fixed H and finish, and `finish` is applied once to the sum.
    """

    block_size: int | None = None
    stream: str = ""
    permuted: ClassVar[Permuted] = "rows"  # of each factor of H
    cut: ClassVar[bool] = False  # `finish` keeps the first numbers alone

    def __post_init__(self) -> None:
        block = self.block_size
        if block is not None and (block < 1 or block & (block - 1)):
            raise ValueError(
                f"block_size must be a power of two, got {block}: "
                f"pass {next_power_of_two(block)}."
            )
        super().__post_init__()

    @property
    def block(self) -> int:
        """Number of elements in a block: `block_size`, or in_size rounded up."""
        return self.block_size or next_power_of_two(self.in_size)

    @property
    def largest_out_size(self) -> int:
        """The longest sketch that one block can give."""
        return self.block

    @property
    def mixed_shape(self) -> tuple[int, int]:
        """Shape of the sum over blocks: (segments, elements per segment)."""
        return 1, self.block

    @property
    def kind(self) -> Mix:
        """Kind of the transform H."""
        return "hadamard"

    @property
    def signs_before(self) -> bool:
        """Whether signs are flipped before H, too: random rotations need none."""
        return self.kind != "kronecker"  # section 3 of the paper

    @abstractmethod
    def finish(self, mixed: Tensor) -> Tensor:
        """Turn the sum over blocks into the sketch: (b, mixed) -> (b, out_size).

        May overwrite its argument.
        """

    @abstractmethod
    def finish_adjoint(self, rows: Tensor) -> Tensor:
        """The transpose of `finish`: (b, out_size) -> (b, mixed)."""

    def apply_rows(self, rows: Tensor) -> Tensor:
        return self.finish(self.accumulate(rows))

    def apply_part(self, part: Tensor, start: int) -> Tensor:
        """Sketch the blocks that the part touches: (b, length) -> (b, out_size)."""
        return self.finish(self.accumulate_part(part, start))

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        batch, block = len(rows), self.block
        segments, width = self.mixed_shape
        mixed = self.finish_adjoint(rows).reshape(batch, segments, width)
        if self.block_size is None:
            x = self._flip_whole(mixed.flatten(1), "after")
            x = mix_adjoint(x, self._mixing, block).contiguous()
            return self._flip_whole(x, "before")[:, : self.in_size]
        result = rows.new_empty(batch, self.in_size)
        for piece in self._pieces(rows, 0, self.in_size):
            blocks = len(piece.places)
            one = segments == 1
            x = mixed.repeat(1, blocks, 1) if one else mixed[:, piece.places]
            x = piece.flip_("after", x)
            x = mix_adjoint(x.view(-1, width), self._mixing, block)
            x = piece.flip_("before", x.reshape(batch, blocks, block))
            kept = piece.high - piece.low
            result[:, piece.low : piece.high] = x.view(batch, -1)[:, :kept]
        return result

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sketch sum_t left_t (x) right_t, a few blocks of it at a time."""
        segments, size = self.mixed_shape
        total = right.new_zeros(len(right), segments * size)
        width, memory = right.shape[-1], WorkingMemory()
        for low, high in spans(
            self.in_size, fitting(len(right) * self.block) * self.block
        ):
            if is_touched(left, low // width, -(-high // width)):
                part = form_outer(left, right, low, high)
                total += self.accumulate(part, low // self.block, memory)
        return self.finish(total)

    def accumulate(
        self,
        rows: Tensor,
        first_block: int = 0,
        memory: WorkingMemory | None = None,
    ) -> Tensor:
        """The sum over blocks, before `finish`.

        Operators that differ in `in_size` and `stream` alone may add these up and
        finish once. Several calls in a row had better share their working memory.

        Shapes:
            rows (b, length), the coordinates from block `first_block` on
            returns (b, segments * elements of each)
        """
        if can_fuse(self, rows):
            return accumulate_fused(self, rows, first_block)
        batch, length = rows.shape
        if self.block_size is None:
            padded = rows.new_zeros(batch, self.block)
            padded[:, :length] = rows
            return self.accumulate_whole(padded)
        segments, width = self.mixed_shape
        total = rows.new_zeros(batch, segments, width)
        longest = min(fitting(batch * self.block) * self.block, length + self.block)
        memory = WorkingMemory() if memory is None else memory
        buffers = memory.take(rows, batch * longest, batch * longest)
        for piece in self._pieces(rows, first_block, length):
            blocks = len(piece.places)
            x = rows[:, piece.low : piece.high]
            if x.shape[1] < blocks * self.block:
                x = torch.nn.functional.pad(x, (0, blocks * self.block - x.shape[1]))
            x = x.reshape(batch, blocks, self.block)
            flipped, scratch = (buffer[: x.numel()] for buffer in buffers)
            x = piece.flip("before", x, out=flipped.view(x.shape))
            x = mix_rows(x.view(-1, self.block), self._mixing, width, scratch)
            x = piece.flip_("after", x.reshape(batch, blocks, width))
            if segments == 1:
                total.baddbmm_(x.new_ones(batch, 1, blocks), x)
            elif is_lazy(x):
                total.index_add_(1, piece.places, x)
            else:
                for example, part in enumerate(x):
                    total[example].index_add_(0, piece.places, part)
        return total.view(batch, segments * width)

    def accumulate_part(
        self, part: Tensor, start: int, memory: WorkingMemory | None = None
    ) -> Tensor:
        """`accumulate` for coordinates that need not begin with a block.

        Shapes:
            part (b, length), the coordinates from `start` on
            returns (b, segments * elements of each)
        """
        first_block, before = divmod(start, self.block)
        if not before:
            return self.accumulate(part, first_block, memory)
        head, rest = part.tensor_split([self.block - before], dim=1)
        head = torch.nn.functional.pad(head, (before, 0))
        total = self.accumulate(head, first_block, memory)
        if rest.shape[1]:
            total += self.accumulate(rest, first_block + 1, memory)
        return total

    def accumulate_whole(self, padded: Tensor) -> Tensor:
        """`accumulate` for an operator of one block; overwrites its input.

        Shapes:
            padded (b, block), zeros after in_size -> (b, elements of the segment)
        """
        x = self._flip_whole(padded, "before")
        x = mix_rows(x, self._mixing, self.mixed_shape[1], torch.empty_like(x))
        x = x.contiguous()
        return self._flip_whole(x, "after")

    def _flip_whole(self, x: Tensor, role: str) -> Tensor:
        """Flip signs of one block in place, without ever holding all the masks."""
        if role == "before" and not self.signs_before:
            return x
        rng = CounterRandom(self.seed, f"fresh-{role}/{self.stream}")
        for low, high in spans(x.shape[1], fitting(1)):
            part = x[:, low:high]
            masks = sign_masks(rng, low, high - low, drawing(x.device))
            part.copy_(flip(part, masks.to(x.device)))
        return x

    @cached_property
    def _mixing(self) -> Mixing:
        """The factors of H, unscaled."""
        return mixing(self.kind, self.block, self.seed, self.permuted, self.cut)

    def _pieces(self, like: Tensor, first_block: int, length: int) -> Iterator[Piece]:
        """Runs of blocks that fit the working set, of `length` coordinates."""
        end = first_block - (-length // self.block)
        drawn = self._drawn(first_block, end, like.device)
        return drawn.pieces(length, fitting(len(like) * self.block))

    def _drawn(self, first: int, end: int, device: torch.device) -> DrawnBlocks:
        """What is random about some blocks; that of short vectors is kept."""
        kept = not first and self.in_size <= self.block * end <= _KEPT_ELEMENTS
        if kept and device in self._kept:
            return self._kept[device]
        signs = {
            role: BlockSigns(self.signs(role), self.block, first, end, device)
            for role in (ROLES if self.signs_before else ROLES[1:])
        }
        drawn = DrawnBlocks(
            self.block, first, signs, self.places(first, end).to(device)
        )
        if kept:
            self._kept[device] = drawn
        return drawn

    @cached_property
    def _kept(self) -> dict[torch.device, DrawnBlocks]:
        return {}

    def signs(self, role: str) -> StreamSigns:
        """The signs "before" or "after" the transform of a block."""
        return StreamSigns(self.seed, role, self.stream, max(RUN, self.block))

    def places(self, start: int, stop: int) -> Tensor:
        """The segments that blocks are added to: hashed from (stream, block)."""
        segments = self.mixed_shape[0]
        if segments == 1:
            return torch.zeros(stop - start, dtype=torch.int64)
        rng = CounterRandom(self.seed, f"segments/{self.stream}")
        words = rng.words(start, stop - start).to(torch.int64) & (2**32 - 1)
        return words * segments >> 32


@dataclass(frozen=True)
class MixedSketch(BlockedSketch):
    """A sketch in blocks that offers a choice of transforms."""

    mix: Mix = "hadamard"

    def __post_init__(self) -> None:
        check_choice("mix", self.mix, MIXES)
        super().__post_init__()

    @property
    def kind(self) -> Mix:
        """Return the transform as chosen."""
        return self.mix

    def moments(self, rows: Tensor) -> Moments:
        """Return what the variances of the sketches of rows are made of.

        Raises:
            ValueError: `mix` is not "hadamard": there is no formula.
        """
        if self.mix != "hadamard":
            raise ValueError(
                f"square_variance has no formula for mix={self.mix!r}. Pass "
                "mix='hadamard'."
            )
        return moments(rows, self.block)
