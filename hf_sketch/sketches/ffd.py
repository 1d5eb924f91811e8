"""FFD: Fastfood, transposed."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sketch.sketches.operator import SeededSketch, fitting, next_power_of_two, spans
from hf_sketch.sketches.transforms.hadamard import (
    apply_kronecker,
    hadamard_matrix,
    kronecker_sizes,
)
from hf_sketch.sketches.transforms.random import (
    CounterRandom,
    ascending_order,
    drawing,
)
from hf_sketch.sketches.transforms.signs import flip, sign_masks
from hf_sketch.sketches.variances.moments import moments


@dataclass(frozen=True)
class FFD(SeededSketch):
    """Sum over blocks of B H P G H x_b, each block as long as the sketch.

    Each block has its own Gaussian diagonal G, permutation P and signs B; H is the
    orthogonal Hadamard transform. The blocks are out_size rounded up to a power of two,
    and the first `out_size` sums are kept. E|S x|^2 = |x|^2, but there are inputs for
    which it fails, because nothing spreads x before G: a block with H x_b = e_1 keeps
    g_1^2 of its squared norm (theorem 3.1 of the paper).

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch, at most in_size rounded up to a power of two.
        seed: the only source of randomness; equal arguments, equal matrix.
        stream: a name that gives independent blocks under the same seed.

    Raises:
        ValueError: a size is out of range.

    Reference:
        Le, Sarlos and Smola 2013; Schioppa 2024, arXiv:2402.03994, eq. (3) and (12),
        with the scale 1 that its theorem C.1 needs.
    """

    stream: str = ""

    def apply_rows(self, rows: Tensor) -> Tensor:
        batch, block = len(rows), self._block
        total = rows.new_zeros(batch, block)
        for first, last in spans(self._blocks, fitting(batch * block)):
            gaussian, order, masks = self._diagonals(first, last, rows)
            x = rows[:, first * block : last * block]
            x = torch.nn.functional.pad(x, (0, len(order) - x.shape[1]))
            x = self._transform(x).mul_(gaussian).index_select(1, order)
            x = self._transform(x)
            x = flip(x, masks, out=x)
            total += x.view(batch, last - first, block).sum(1)
        return total[:, : self.out_size] * self._scale

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        batch, block = len(rows), self._block
        padded = torch.nn.functional.pad(rows, (0, block - self.out_size))
        result = rows.new_empty(batch, self._blocks * block)
        for first, last in spans(self._blocks, fitting(batch * block)):
            gaussian, order, masks = self._diagonals(first, last, rows)
            y = flip(padded.repeat(1, last - first), masks)
            y = self._transform(y)
            y = torch.empty_like(y).index_copy_(1, order, y).mul_(gaussian)
            result[:, first * block : last * block] = self._transform(y)
        return result[:, : self.in_size] * self._scale

    def square_variance(self, rows: Tensor) -> Tensor:
        x = moments(rows, self._block)
        padded = self._blocks * self._block - self.in_size
        whole = torch.nn.functional.pad(rows, (0, padded))
        spread = self._transform(whole).double() / self._block**0.5
        kept = 2 * spread.square().square().sum(1)
        return 2 * x.between / self.out_size + kept

    @property
    def _block(self) -> int:
        return next_power_of_two(self.out_size)

    @property
    def _blocks(self) -> int:
        return -(-self.in_size // self._block)

    @property
    def _scale(self) -> float:
        """1 / sqrt(n) of each transform, and the part that is kept."""
        return (self._block / self.out_size) ** 0.5 / self._block

    def _transform(self, x: Tensor) -> Tensor:
        """H on each block, unscaled: (b, k * block) -> (b, k * block), new memory."""
        factors = [factor.to(x) for factor in self._factors]
        return apply_kronecker(x.reshape(-1, self._block), factors).view(x.shape)

    @cached_property
    def _factors(self) -> list[Tensor]:
        """Factors of the unscaled (symmetric) Hadamard transform."""
        return [hadamard_matrix(size) for size in kronecker_sizes(self._block)]

    def _diagonals(
        self, first: int, last: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """G, P and the sign masks of B of the blocks first, ..., last - 1.

        Shapes:
            returns three times ((last - first) * block,)
        """
        block, count, device = self._block, last - first, drawing(like.device)
        low, size = first * block, count * block
        gaussian = CounterRandom(self.seed, f"ffd-gaussian/{self.stream}")
        signs = CounterRandom(self.seed, f"ffd-signs/{self.stream}")
        orders = (
            CounterRandom(self.seed, f"ffd-order/{self.stream}/{number}")
            for number in range(first, last)
        )
        words = torch.stack([rng.words(0, block, device) for rng in orders])
        order = ascending_order(words)
        order += torch.arange(0, size, block, device=device).unsqueeze(1)
        return (
            gaussian.normals(low, size, device).to(like),
            order.flatten().to(like.device),
            sign_masks(signs, low, size, device).to(like.device),
        )
