"""SRHT: signs, Hadamard, signs; blocks hashed to segments and added."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.variances.moments import moments, of_kept_rows


@dataclass(frozen=True)
class SRHT(BlockedSketch):
    """Rotate each block by signs, Hadamard, signs, and add the blocks up.

    With blocks of at most `out_size` elements nothing is dropped: each block is rotated
    (its norm and inner products are exact) and added to one of out_size / block
    segments, hashed from the block; the fresh signs on both sides make any two blocks
    that meet in a segment uncorrelated. For every x and y

        E <S x, S y> = <x, y>
        Var <S x, S y>
            = sum_{b != c} (|x_b|^2 |y_c|^2 + <x_b, y_b> <x_c, y_c>) / out_size

    which is at most the variance of a dense Gaussian matrix, and zero for inputs within
    one block. One transform of `block_size` elements is the whole cost, for any
    `out_size`. docs/srht.md derives this.

    With longer blocks (or one, the default) only the first coordinates of the rotated
    block are kept: the subsampled randomized Hadamard transform, whose rows are chosen
    by the permutations within the transform's factors.

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch.
        seed: the only source of randomness; equal arguments, equal matrix.
        block_size: a power of two; by default in_size rounded up to one.
        stream: a name that gives independent signs under the same seed.

    Raises:
        ValueError: a size is out of range, or `block_size` is not a power of two.

    Reference:
        Not in Schioppa 2024. Ailon and Chazelle 2009 and Tropp 2011 (one block);
        Balabanov, Beaupere, Grigori and Lederer 2023, arXiv:2210.11295 (sums of blocks
        with signs on both sides); hashing blocks to segments is ours.
    """

    @property
    def mixed_shape(self) -> tuple[int, int]:
        """Number of segments the sketch needs, or the kept part of one."""
        if self.out_size <= self.block:
            return 1, self.out_size
        return -(-self.out_size // self.block), self.block

    def finish(self, mixed: Tensor) -> Tensor:
        """The scale, and the cut of the last segment."""
        return mixed[:, : self.out_size] * self.scale

    def finish_adjoint(self, rows: Tensor) -> Tensor:
        segments, width = self.mixed_shape
        missing = segments * width - self.out_size
        return torch.nn.functional.pad(rows * self.scale, (0, missing))

    def square_variance(self, rows: Tensor) -> Tensor:
        return of_kept_rows(moments(rows, self.block), self.block, self.out_size)

    @property
    def largest_out_size(self) -> int:
        """Segments make room for any length."""
        return self.block if self.block_size is None else sys.maxsize

    @property
    def scale(self) -> float:
        """1 / sqrt(n) of the transform and the square root of the part that is kept."""
        segments, width = self.mixed_shape
        whole = max(self.block, segments * width)
        return (whole / self.out_size / self.block) ** 0.5
