"""QK: a Kronecker product of truncated random rotations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sketch.sketches.choices import check_choice
from hf_sketch.sketches.operator import SeededSketch
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.pieces import WorkingMemory
from hf_sketch.sketches.transforms.folding import fold, folding_columns, folding_signs
from hf_sketch.sketches.transforms.hadamard import apply_kronecker
from hf_sketch.sketches.transforms.mixing import haar_columns
from hf_sketch.sketches.transforms.random import CounterRandom
from hf_sketch.sketches.variances.crossed import variance_of_mean

Rotation = Literal["haar", "signs"]
_LARGEST_FACTOR_BITS = 10
_DRAWS = 8


@dataclass(frozen=True)
class QK(SeededSketch):
    """sqrt(N / D) Q_1 (x) ... (x) Q_k with Q_i the first rows of a random rotation.

    Each Q_i (out_factors[i] x in_factors[i]) is the first rows of a Haar rotation;
    N and D are the products of the factors. An x shorter than N is padded with zeros,
    and of the D results the first `out_size` are kept. E|S x|^2 = |x|^2.

    Inputs of low rank or with few non-zeros in the factors' directions concentrate
    worse than under AFFD: for a rank-one input the variance of |S x|^2 / |x|^2 is
    prod_i (1 + 2 (B_i - D_i) / (D_i (B_i + 2))) - 1, not 2 / D. An out_size below 2^k
    leaves factors with a single row, which is weaker still.

    With `rotation="signs"` coordinate j of factor i adds to coordinate j mod D_i with a
    random sign instead (a count sketch with its buckets in turn). Inner products have
    the same mean, and projecting one side of an outer product costs reading it. One
    non-zero is then kept exactly, but two that meet in all factors' buckets cancel or
    double, whatever D.

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch.
        seed: the only source of randomness; equal arguments, equal matrix.
        in_factors: B_1, ..., B_k, product at least in_size; by default balanced powers
            of two of at most 1024.
        out_factors: D_1, ..., D_k with D_i <= B_i, product at least out_size; by
            default balanced powers of two.
        stream: a name that gives independent rotations under the same seed.
        rotation: "haar" (the paper's) or "signs".

    Raises:
        ValueError: a size is out of range, the factors do not fit the sizes, or
            `rotation` is unknown.

    Reference:
        Schioppa 2024, arXiv:2402.03994, eq. (8) and C.5; the factors are balanced where
        Listing 2 lets the leading one shrink to 1, and the columns of the QR
        decomposition get the signs that make it Haar (up to the determinant's sign,
        which no inner product sees). "signs": Charikar, Chen and Farach-Colton 2002,
        as factors of a Kronecker product.
    """

    in_factors: tuple[int, ...] = ()
    out_factors: tuple[int, ...] = ()
    stream: str = ""
    rotation: Rotation = "haar"

    def __post_init__(self) -> None:
        check_choice("rotation", self.rotation, get_args(Rotation))
        super().__post_init__()
        into, out = self._sizes
        fits = len(into) == len(out) and all(
            0 < d <= b for d, b in zip(out, into, strict=True)
        )
        if not fits or math.prod(into) < self.in_size:
            raise ValueError(
                f"in_factors must have a product of at least in_size={self.in_size} and"
                f" out_factors one entry for each, none larger, got {into} and {out}: "
                "leave both out for balanced factors."
            )
        if math.prod(out) < self.out_size:
            raise ValueError(
                f"out_factors must have a product of at least out_size={self.out_size},"
                f" got {out}: leave them out for balanced factors."
            )

    def apply_rows(self, rows: Tensor) -> Tensor:
        missing = math.prod(self._sizes[0]) - self.in_size
        if missing:
            rows = torch.nn.functional.pad(rows, (0, missing))
        if self.rotation == "signs":
            return self._fold_all(rows)[:, : self.out_size]
        factors = [self._rotation(axis, rows).T for axis in range(len(self._sizes[0]))]
        return apply_kronecker(rows, factors)[:, : self.out_size] * self._scale

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        missing = math.prod(self._sizes[1]) - self.out_size
        padded = torch.nn.functional.pad(rows, (0, missing))
        factors = [self._rotation(axis, rows) for axis in range(len(self._sizes[0]))]
        return apply_kronecker(padded, factors)[:, : self.in_size] * self._scale

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sketch sum_t left_t (x) right_t; the product is never formed if k = 2."""
        width = right.shape[-1]
        if self.sides != (self.in_size // width, width):
            return super().apply_outer(left, right)
        return self.apply_folded(self.fold(left, 0), self.fold(right, 1))

    def apply_part(self, part: Tensor, start: int) -> Tensor:
        """Sketch some coordinates: (b, length) -> (b, out_size).

        Rows of a matrix of `sides` are projected as they are, with a copy if the part
        begins or ends within one.
        """
        if self.sides is None:
            return super().apply_part(part, start)
        width = self.sides[1]
        first, before = divmod(start, width)
        after = -(before + part.shape[1]) % width
        if before or after:
            part = torch.nn.functional.pad(part, (before, after))
        matrix = part.reshape(len(part), -1, width)
        last = first + matrix.shape[1]
        left = torch.arange(first, last, device=part.device).expand(len(part), -1)
        return self.apply_outer(left, matrix)

    @property
    def sides(self) -> tuple[int, int] | None:
        """The (m, n) of outer products that are sketched without being formed."""
        into = self._sizes[0]
        if len(into) != 2 or math.prod(into) != self.in_size:
            return None
        return into[0], into[1]

    def fold(self, factor: Tensor, side: int) -> Tensor:
        """All that the sketch of an outer product needs of one of its factors.

        Shapes:
            factor (b, t, sides[side]), or integer (b, t) for one-hot vectors
            returns (b, t, out_factors[side])
        """
        if factor.is_floating_point() and self.rotation == "signs":
            return fold(factor, self._signs[side].to(factor), self._sizes[1][side])
        rotation = self._rotation(side, factor)
        if factor.is_floating_point():
            return factor @ rotation
        return torch.nn.functional.embedding(factor, rotation)

    def apply_folded(self, left: Tensor, right: Tensor) -> Tensor:
        """`apply_outer` of factors that were folded, side 0 and side 1.

        Shapes:
            returns (b, out_size)
        """
        product = torch.matmul(left.transpose(1, 2).to(right.dtype), right)
        return product.flatten(1)[:, : self.out_size] * self._scale

    def add_folded_(self, rows: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `apply_folded` to rows (b, out_size) in place, reading them once."""
        out = self._sizes[1]
        if math.prod(out) != self.out_size:
            rows += self.apply_folded(left, right)
            return
        left = left.transpose(1, 2).to(right.dtype)
        rows.view(len(rows), *out).baddbmm_(left, right, alpha=self._scale)

    def add_outer_(
        self, rows: Tensor, left: Side, right: Side, memory: WorkingMemory
    ) -> None:
        """Add the sketch of sum_t left_t (x) right_t to rows (b, out_size), in place.

        The folded sides are small, and need no `memory` of others.
        """
        folded = (
            side.folded_by(partial(self.fold, side=place), rows.dtype)
            for place, side in enumerate((left, right))
        )
        self.add_folded_(rows, *folded)

    def square_variance(self, rows: Tensor) -> Tensor:
        """Estimate it from the sketches of a few seeds.

        The squares of a sketch are an array of D_1 x ... x D_k, drawn without
        replacement from that of the whole rotations (B_1 x ... x B_k), whose sum is
        known. With `rotation="signs"`, whose sums vary less, it is an upper estimate.
        """
        into, out = self._sizes
        rest = math.prod(out[1:])
        kept = (self.out_size // rest, *out[1:])  # the whole rows of the first factor
        if not kept[0]:
            return super().square_variance(rows)
        used = kept[0] * rest
        left = [
            1.0 if self.rotation == "signs" else 1 - d / b
            for b, d in zip(into, kept, strict=True)
        ]
        draws = [replace(self, seed=self.seed + 1 + k) for k in range(_DRAWS)]
        squares = [(rows @ draw.T)[:, :used].double().square() for draw in draws]
        found = [variance_of_mean(x.view(-1, *kept), left) for x in squares]
        return torch.stack(found).mean(0) * self.out_size**2

    def _fold_all(self, rows: Tensor) -> Tensor:
        """Every factor of signs in turn, the last first: (b, N) -> (b, D)."""
        into, out = self._sizes
        x = rows.reshape(len(rows), *into)
        for axis in reversed(range(len(into))):
            folded = fold(x.movedim(axis + 1, -1), self._signs[axis].to(x), out[axis])
            x = folded.movedim(-1, axis + 1)
        return x.flatten(1)

    @property
    def _scale(self) -> float:
        """Rotations cut short lose length; added coordinates do not."""
        if self.rotation == "signs":
            return 1.0
        into, out = self._sizes
        return math.sqrt(math.prod(into) / math.prod(out))

    @cached_property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(B_1, ..., B_k) and (D_1, ..., D_k), balanced where not given."""
        into = self.in_factors or _balanced_in(self.in_size)
        return into, self.out_factors or _balanced_out(self.out_size, into)

    @cached_property
    def _rotations(self) -> tuple[Tensor, ...]:
        """Q_i transposed: (B_i, D_i), float32 on the CPU."""
        out = self._sizes[1]
        if self.rotation == "signs":
            return tuple(map(folding_columns, self._signs, out))
        return tuple(map(haar_columns, self._sizes[0], out, self._generators))

    def _rotation(self, axis: int, like: Tensor) -> Tensor:
        """Q_axis transposed where `like` is, kept: each copy there is waited for.

        Its type is that of `like`, or float32 beside integers.
        """
        dtype = like.dtype if like.is_floating_point() else torch.float32
        key = axis, like.device, dtype
        if key not in self._placed:
            self._placed[key] = self._rotations[axis].to(like.device, dtype)
        return self._placed[key]

    @cached_property
    def _placed(self) -> dict[tuple[int, torch.device, torch.dtype], Tensor]:
        """Rotations by axis, device and type."""
        return {}

    @cached_property
    def _signs(self) -> tuple[Tensor, ...]:
        """The signs of each factor's coordinates: (B_i,)."""
        return tuple(map(folding_signs, self._sizes[0], self._generators))

    @property
    def _generators(self) -> list[CounterRandom]:
        """The random numbers of each factor."""
        axes = range(len(self._sizes[0]))
        return [CounterRandom(self.seed, f"qk/{axis}/{self.stream}") for axis in axes]


def balanced_powers(bits: int, ceilings: Sequence[int]) -> tuple[int, ...] | None:
    """Powers of two with product 2**bits, as equal as `ceilings` allow; None if none.

    The later factors get the larger share.
    """
    exponents = [0] * len(ceilings)
    for _ in range(bits):
        free = [i for i, top in enumerate(ceilings) if 2 ** (exponents[i] + 1) <= top]
        if not free:
            return None
        exponents[min(free, key=lambda i: (exponents[i], -i))] += 1
    return tuple(2**exponent for exponent in exponents)


def _balanced_in(in_size: int) -> tuple[int, ...]:
    """Powers of two of at most 1024 whose product covers `in_size`."""
    bits = (in_size - 1).bit_length()
    count = max(1, -(-bits // _LARGEST_FACTOR_BITS))
    return balanced_powers(bits, [2**_LARGEST_FACTOR_BITS] * count) or (1,)


def _balanced_out(out_size: int, into: tuple[int, ...]) -> tuple[int, ...]:
    """Powers of two below `into` whose product covers `out_size`; `into` if none."""
    return balanced_powers((out_size - 1).bit_length(), into) or into
