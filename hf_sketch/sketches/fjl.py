"""FJL: signs, Hadamard, sparse Gaussian."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hf_sketch.sketches.blocked import MixedSketch
from hf_sketch.sketches.transforms.mixing import Permuted
from hf_sketch.sketches.transforms.random import CounterRandom


@dataclass(frozen=True)
class FJL(MixedSketch):
    """Signs, Hadamard, then `samples` random coordinates for each number, weighted.

    On one block of n elements this is sqrt(n / out_size) G_s H B: every row of G_s has
    `samples` entries of variance 1 / samples at random places (drawn with repetition).
    The look-ups are gathers, and G_s takes 12 out_size * samples bytes: the paper's
    slow baseline.

    Args and errors are those of AFFD, and one more.

    Args:
        samples: number of coordinates in each number, defaults to 16.

    Reference:
        Ailon and Chazelle 2009; Schioppa 2024, arXiv:2402.03994, eq. (2). The paper
        leaves the number of samples open; 16 is ours, and more change the variance
        little.
    """

    samples: int = 16
    permuted: ClassVar[Permuted] = "none"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(
                f"samples must be at least 1, got {self.samples}: pass 1 or more."
            )
        super().__post_init__()

    def finish(self, mixed: Tensor) -> Tensor:
        """G_s and the whole scale."""
        index, weight = self.sparse
        picked = mixed[:, index.to(mixed.device)] * weight.to(mixed)
        return picked.sum(-1) * self.scale

    def finish_adjoint(self, rows: Tensor) -> Tensor:
        index, weight = self.sparse
        spread = (rows.unsqueeze(-1) * weight.to(rows)).flatten(1)
        mixed = rows.new_zeros(len(rows), self.block)
        mixed.index_add_(1, index.flatten().to(rows.device), spread)
        return mixed * self.scale

    @property
    def scale(self) -> float:
        """The product of sqrt(n / D), 1 / sqrt(n) and that of the weights."""
        return (self.out_size * self.samples) ** -0.5

    @property
    def cross_variance(self) -> float:
        """Numbers of few samples have heavier tails than Gaussian ones."""
        return (1 + 2 / self.samples) / self.out_size

    def square_variance(self, rows: Tensor) -> Tensor:
        x = self.moments(rows)
        shared = 2 * x.between / self.block
        repeated = 9 * x.whole - 6 * x.fourth
        other = (self.samples - 1) * (3 * x.whole + 3 * shared)
        second = (repeated + other) / self.samples
        return (second - x.whole - shared) / self.out_size + shared

    @cached_property
    def sparse(self) -> tuple[Tensor, Tensor]:
        """Places and unscaled weights of G_s: (out_size, samples), on the CPU."""
        count = self.out_size * self.samples
        shape = (self.out_size, self.samples)
        places = CounterRandom(self.seed, "sparse-places").words(0, count)
        weights = CounterRandom(self.seed, "sparse-weights").normals(0, count)
        index = (places & (self.block - 1)).to(torch.int64)
        return index.view(shape), weights.view(shape)
