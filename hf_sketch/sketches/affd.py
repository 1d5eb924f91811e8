"""AFFD: signs, Hadamard, Gaussian, Hadamard, restrict."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sketch.sketches.hadamard import (
    apply_kronecker,
    hadamard_matrix,
    kronecker_sizes,
    leading_rows,
)
from hf_sketch.sketches.operator import Sketch, check_sizes, next_power_of_two
from hf_sketch.sketches.outer import form_outer, is_touched
from hf_sketch.sketches.random import CounterRandom

_BLOCKS_PER_WORD = 16  # two signs a block, 32 bits a word
_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class AFFD(Sketch):
    """Signs, Hadamard, Gaussian diagonal, Hadamard; keep the first coordinates.

    On one block of n elements this is sqrt(n / out_size) R H2 G H1 B: B random signs,
    G a Gaussian diagonal, H1 and H2 Kronecker products of small Hadamard matrices with
    permuted rows (H1) and permuted columns (H2), each scaled to be orthogonal, R the
    first `out_size` coordinates. There are no gathers. E|S x|^2 = |x|^2.

    With `block_size`, x is cut into blocks (the last one padded with zeros) whose
    sketches are summed. Blocks share H1, H2 and the magnitudes in G; the signs in B and
    in G are drawn afresh for every block and every `stream`. The first two moments of
    an inner product are those of independent blocks, because the two fresh sign
    diagonals make different blocks uncorrelated for every fixed H1, H2 and |G|; and H2
    is applied once to the sum, so that each block costs one transform.

    Growing `out_size` keeps what was there: at equal padded sizes the first D
    coordinates of AFFD(2D) are those of AFFD(D), divided by sqrt(2).

    Shapes:
        S @ x    (in_size,) -> (out_size,), or (in_size, b) -> (out_size, b)
        S.T @ y  the reverse

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch, in [1, block size].
        seed: the only source of randomness; equal arguments, equal matrix.
        block_size: a power of two; by default in_size rounded up to one.
        stream: a name that gives independent signs under the same seed.

    Raises:
        ValueError: a size is out of range, or `block_size` is not a power of two.

    Reference:
        Schioppa 2024, arXiv:2402.03994, eq. (6) and B.4; H1 and H2 stand where eq. (6)
        has them (Listing 4 applies their transposes), and zero padding is ours.
    """

    in_size: int
    out_size: int
    seed: int
    block_size: int | None = None
    stream: str = ""

    def __post_init__(self) -> None:
        block = self.block_size
        if block is not None and (block < 1 or block & (block - 1)):
            raise ValueError(
                f"block_size must be a power of two, got {block}: "
                f"pass {next_power_of_two(max(block, 1))}."
            )
        check_sizes(self.in_size, self.out_size, self._block if self.in_size > 0 else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's shape: (out_size, in_size)."""
        return self.out_size, self.in_size

    def apply_rows(self, rows: Tensor) -> Tensor:
        """Sketch each row: (b, in_size) -> (b, out_size)."""
        return self._finish(self._mix(rows, first_block=0))

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        """Apply the transpose to each row: (b, out_size) -> (b, in_size)."""
        first, second, magnitude = self._factors_like(rows)
        prefix = leading_rows(second, self.out_size)
        kept = torch.Size(factor.shape[0] for factor in prefix).numel()
        padded = torch.nn.functional.pad(rows, (0, kept - self.out_size))
        mixed = apply_kronecker(padded, [factor.T for factor in prefix])
        mixed = mixed * magnitude
        result = rows.new_empty(rows.shape[0], self.in_size)
        transposed = [factor.T for factor in first]
        for low, high, before, after in self._chunks(rows, 0, self.in_size):
            blocks = before.shape[0]
            x = _flip(mixed.unsqueeze(1).expand(-1, blocks, -1), after)
            x = apply_kronecker(x.reshape(-1, self._block), transposed)
            x = _flip(x.view(-1, blocks, self._block), before)
            result[:, low:high] = x.reshape(-1, blocks * self._block)[:, : high - low]
        return result

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sketch sum_t left_t (x) right_t, a few blocks of it at a time."""
        total = right.new_zeros(right.shape[0], self._block)
        width = right.shape[-1]
        step = max(1, _CHUNK_ELEMENTS // max(1, right.shape[0] * self._block))
        for block in range(0, self._blocks, step):
            low = block * self._block
            high = min(low + step * self._block, self.in_size)
            if is_touched(left, low // width, -(-high // width)):
                total += self._mix(form_outer(left, right, low, high), block)
        return self._finish(total)

    @property
    def _block(self) -> int:
        return self.block_size or next_power_of_two(self.in_size)

    @property
    def _blocks(self) -> int:
        return -(-self.in_size // self._block)

    def _mix(self, rows: Tensor, first_block: int) -> Tensor:
        """Sum over the blocks in `rows` of (signs of G) H1 B, unscaled."""
        batch, length = rows.shape
        first, _, _ = self._factors_like(rows)
        total = rows.new_zeros(batch, self._block)
        for low, high, before, after in self._chunks(rows, first_block, length):
            blocks = before.shape[0]
            x = rows[:, low:high]
            if high - low < blocks * self._block:
                x = torch.nn.functional.pad(x, (0, blocks * self._block - high + low))
            x = _flip(x.reshape(batch, blocks, self._block), before)
            x = apply_kronecker(x.reshape(-1, self._block), first)
            total += _flip(x.view(batch, blocks, self._block), after).sum(1)
        return total

    def _finish(self, mixed: Tensor) -> Tensor:
        """Magnitudes of G, then the rows of H2 that are kept."""
        _, second, magnitude = self._factors_like(mixed)
        prefix = leading_rows(second, self.out_size)
        return apply_kronecker(mixed * magnitude, prefix)[:, : self.out_size]

    def _chunks(
        self, like: Tensor, first_block: int, length: int
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Runs of blocks that fit the working set, with their sign bits in place.

        Yields (low, high, before, after): elements [low, high) of `length`, and for
        each of their blocks words (blocks, block) whose top bits are the signs of B
        and of G.
        """
        rng = CounterRandom(self.seed, f"affd-signs/{self.stream}")
        step = max(1, _CHUNK_ELEMENTS // max(1, like.shape[0] * self._block))
        block = first_block
        end = first_block - (-length // self._block)
        group, words = -1, like.new_empty(0)
        while block < end:
            if group != block // _BLOCKS_PER_WORD:
                group = block // _BLOCKS_PER_WORD
                words = rng.words(group * self._block, self._block, like.device)
            stop = min(block + step, end, (group + 1) * _BLOCKS_PER_WORD)
            shift = torch.arange(block, stop, device=like.device, dtype=torch.int32)
            shift = (2 * (shift % _BLOCKS_PER_WORD)).unsqueeze(1)
            low = (block - first_block) * self._block
            high = min((stop - first_block) * self._block, length)
            yield low, high, words << shift, words << (shift + 1)
            block = stop

    def _factors_like(self, like: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """H1's and H2's unscaled factors, and |G| with the whole scale, like `like`."""
        first, second, magnitude = self._factors
        return (
            [factor.to(like) for factor in first],
            [factor.to(like) for factor in second],
            # sqrt(n / D) of the restriction, 1 / sqrt(n) of each of the transforms.
            magnitude.to(like) * (self._block * self.out_size) ** -0.5,
        )

    @cached_property
    def _factors(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """H1's and H2's factors, unscaled, and |G|; float32 on the CPU."""
        first: list[Tensor] = []
        second: list[Tensor] = []
        for axis, size in enumerate(kronecker_sizes(self._block)):
            matrix = hadamard_matrix(size)
            rows = CounterRandom(self.seed, f"affd-rows/{axis}").permutation(size)
            columns = CounterRandom(self.seed, f"affd-columns/{axis}").permutation(size)
            first.append(matrix[rows])
            second.append(matrix[:, columns])
        gaussian = CounterRandom(self.seed, "affd-gaussian").normals(0, self._block)
        return first, second, gaussian.abs()


def _flip(x: Tensor, words: Tensor) -> Tensor:
    """Flip the sign of x wherever the top bit of the 32-bit word is set."""
    sign = words & -(2**31)
    if x.dtype == torch.float64:
        sign = sign.to(torch.int64) << 32
    return (x.contiguous().view(sign.dtype) ^ sign).view(x.dtype)
