"""Grouped: both sides folded and rotated; one side's groups meet the other's."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_sketch.sketches.operator import SeededSketch, fitting, next_power_of_two
from hf_sketch.sketches.transforms.folding import add_up, folding_signs
from hf_sketch.sketches.transforms.hadamard import hadamard_matrix
from hf_sketch.sketches.transforms.random import CounterRandom

Drawn = Literal["signs", "rows"]


@dataclass(frozen=True)
class Grouped(SeededSketch):
    """Sketch of matrices that are sums of outer products, as gradients of weights are.

    Each side is folded to a width W_i with random signs: coordinate j adds to place
    j mod W_i. Place (c, p) = divmod(place, s_i) is rotated along c by a Hadamard matrix
    of r = W_1 W_2 / D rows in a random order, which makes r groups of s_i numbers.
    Group k of one side is multiplied with group k of the other, and with no other:

        S X [k, p, q] = r^(-1/2) sum_{c, d} H_1[k, c] H_2[k, d] X'[(c, p), (d, q)]

    where X' is the folded matrix, s_1 = D / W_2 and s_2 = D / W_1. Groups have their
    rows of H in two independent orders. A sum of outer products is sketched token by
    token with D multiply-adds for the products, as many as there are results, and
    (W_1 + W_2) r for the rotations.

    E <S X, S Y> = <X, Y>. Where no side is longer than its width, the variance is about

        (|X|^2 |Y|^2 + <X, Y>^2 + |X Y^T|^2 + |X^T Y|^2) / D

    which is at most twice that of a dense Gaussian matrix; docs/grouped.md derives it.

    A parameter of three dimensions, of experts, is a matrix per expert. Each has signs
    of its own; their sketches add up.

    Args:
        in_size: number of parameters sketched, the product of `sides`.
        out_size: length of the sketch. Between powers of two some groups are left out,
            and of the numbers after the last group each is 0.
        seed: the only source of randomness; equal arguments, equal matrix.
        sides: (m, n), or (experts, m, n).
        widths: W_1 and W_2, powers of two of at most `out_size` rounded up to one,
            with a product of at least that.
        stream: a name that gives independent signs under the same seed.

    Raises:
        ValueError: a size is out of range, or sizes do not fit each other.

    Reference:
        Not in Schioppa 2024. Sparse products of two sketched sides: Pham and Pagh 2013
        (TensorSketch, to which this comes down with one order for both sides); rotated
        sides in two orders and groups of several places are ours.
    """

    sides: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    stream: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = math.prod(self.sides)
        if len(self.sides) not in (2, 3) or size != self.in_size:
            raise ValueError(
                "sides must be (m, n) or (experts, m, n) with a product of "
                f"in_size={self.in_size}, got {self.sides}: pass the weight's shape."
            )
        longest = next_power_of_two(self.out_size)
        fits = len(self.widths) == 2 and all(
            1 <= w <= longest and not w & (w - 1) for w in self.widths
        )
        if not fits or math.prod(self.widths) < longest:
            raise ValueError(
                f"widths must be two powers of two of at most {longest} with a product "
                f"of at least that, got {self.widths}: leave the choice to ModelSketch."
            )

    @property
    def groups(self) -> int:
        """R, the number of rows of the Hadamard matrix."""
        longest = next_power_of_two(self.out_size)
        return self.widths[0] * self.widths[1] // longest

    @property
    def group_sizes(self) -> tuple[int, int]:
        """s_1 and s_2, the numbers of each side in a group."""
        return self.widths[0] // self.groups, self.widths[1] // self.groups

    @property
    def kept(self) -> int:
        """Number of groups that the sketch has room for."""
        first, second = self.group_sizes
        return self.out_size // (first * second)

    @property
    def numbers_per_product(self) -> int:
        """The most numbers held per outer product while a batch of them is sketched.

        Both sides are held folded, and again rotated; of the second also a copy.
        """
        return 2 * self._places(0) + 3 * self._places(1)

    def apply_rows(self, rows: Tensor) -> Tensor:
        return self.apply_part(rows, 0)

    def apply_part(self, part: Tensor, start: int) -> Tensor:
        """Sketch some coordinates: (b, length) -> (b, out_size).

        The part is copied if it begins or ends within a row of a matrix.
        """
        *_, height, width = self.sides
        first, before = divmod(start, width)
        after = -(before + part.shape[1]) % width
        if before or after:
            part = torch.nn.functional.pad(part, (before, after))
        rows = part.reshape(len(part), -1, width)
        folded = part.new_zeros(len(part), self._places(0), self._places(1))
        low, last = first, first + rows.shape[1]
        while low < last:
            expert, row = divmod(low, height)
            high = min(last, low - row + height)
            matrix = self._fold_rows(rows[:, low - first : high - first], expert, row)
            folded += self._fold_side(matrix, self._signs_at(1, part)[expert], 1)
            low = high
        return self._join_folded(folded)

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        *_, height, width = self.sides
        first, second = self._rows(0, rows), self._rows(1, rows)
        shape = (self.kept, *self.group_sizes)
        groups = rows[:, : math.prod(shape)].unflatten(1, shape)
        groups = groups.unsqueeze(2) * first[:, :, None, None]
        x = torch.matmul(second.T, groups.flatten(2))  # (b, d, c p q)
        x = x.unflatten(2, groups.shape[2:]).permute(0, 2, 3, 1, 4)
        x = x.flatten(3).flatten(1, 2) * self._scale
        for axis, length in ((1, height), (2, width)):
            times = [1, 1, 1]
            times[axis] = -(-length // x.shape[axis])
            x = x.repeat(times).narrow(axis, 0, length)
        x = x.unsqueeze(1) * self._signs_at(0, x).unsqueeze(2)
        return x.mul_(self._signs_at(1, x).unsqueeze(1)).flatten(1)

    def square_variance(self, rows: Tensor) -> Tensor:
        """Return an upper estimate: the formula above, which is of sides at random."""
        *_, height, width = self.sides
        x = rows.double().view(len(rows), -1, height, width)
        x = x.mT if width > height else x
        products = (x.mT @ x).square().sum((1, 2, 3))
        return 2 * (x.square().sum((1, 2, 3)).square() + products) / self.out_size

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sketch sum_t left_t (x) right_t; the product is never formed."""
        if len(self.sides) == 3 or right.shape[-1] != self.sides[1]:
            return super().apply_outer(left, right)
        total = right.new_zeros(len(right), self.out_size)
        self.add_folded_(total, self.fold(left, 0), self.fold(right, 1))
        return total

    def fold(self, factor: Tensor, side: int, expert: Tensor | None = None) -> Tensor:
        """All that the sketch of an outer product needs of one of its factors.

        Shapes:
            factor (b, t, length of the side), or integer (b, t) for one-hot vectors
            expert (b, t), whose matrix each product belongs to; None without experts
            returns (b, t, at most widths[side])
        """
        if not factor.is_floating_point():
            return self._fold_one_hot(factor, side)
        signs = self._signs_at(side, factor)
        return self._fold_side(factor, signs[0 if expert is None else expert], side)

    def add_folded_(self, rows: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the sketch of sum_t left_t (x) right_t to rows (b, out_size), in place.

        Both sides are folded.
        """
        some = len(left)
        if left.device.type == "cpu":  # 1 MiB at a time stays in the cache
            some = fitting(4 * left.shape[1] * max(self.widths))
        parts = (x.split(some) for x in (rows, left, right))
        for total, first, second in zip(*parts, strict=True):
            turned = self._turn(0, first.to(rows)), self._turn(1, second.to(rows))
            self._add_turned_(total, *turned)

    def _add_turned_(self, rows: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the products of the groups of both sides to rows, in place."""
        shape = (self.kept, *self.group_sizes)
        if math.prod(shape) == self.out_size:
            total = rows.view(-1, *self.group_sizes)
            total.baddbmm_(left.mT, right, alpha=self._scale)
        else:  # some numbers are in no group
            product = torch.bmm(left.mT, right).view(len(rows), -1)
            rows[:, : math.prod(shape)].add_(product, alpha=self._scale)

    def _turn(self, side: int, folded: Tensor) -> Tensor:
        """The groups of a folded side: (b, t, places) -> (b * kept, t, s)."""
        examples, tokens, _ = folded.shape
        size = self.group_sizes[side]
        places = folded.unflatten(2, (-1, size)).transpose(1, 2).flatten(2)
        turned = torch.matmul(self._rows(side, folded), places)
        return turned.view(examples * self.kept, tokens, size)

    def _join_folded(self, matrix: Tensor) -> Tensor:
        """The sketch of a matrix that is folded along both sides."""
        examples, first = len(matrix), self.group_sizes[0]
        turned = self._turn(1, matrix).view(examples, self.kept, -1)
        # (b, k, c p q), of which H_1's row k takes the sum over c
        turned = turned.view(examples, self.kept, self._places(0) // first, -1)
        groups = torch.matmul(self._rows(0, matrix).unsqueeze(1), turned).flatten(1)
        missing = self.out_size - groups.shape[1]
        return torch.nn.functional.pad(groups * self._scale, (0, missing))

    def _fold_rows(self, rows: Tensor, expert: int, first: int) -> Tensor:
        """Fold rows of an expert's matrix: (b, rows, n) -> (b, places, n)."""
        places = self._places(0)
        signs = self._signs_at(0, rows)[expert].unsqueeze(1)
        folded = rows.new_zeros(len(rows), places, rows.shape[2])
        low, last = first, first + rows.shape[1]
        while low < last:
            place = low % places
            high = min(last, low + places - place)
            part = rows[:, low - first : high - first]
            folded[:, place : place + high - low].addcmul_(part, signs[low:high])
            low = high
        return folded

    def _fold_side(self, x: Tensor, signs: Tensor, side: int) -> Tensor:
        """Fold the last dimension: (b, t, length) -> (b, t, places)."""
        places = self._places(side)
        folded = add_up(x, signs, places)
        return torch.nn.functional.pad(folded, (0, places - folded.shape[-1]))

    def _fold_one_hot(self, index: Tensor, side: int) -> Tensor:
        """Fold one-hot vectors: (b, t) -> (b, t, places), without scattering."""
        (signs,) = self._signs_at(side, index)
        sign = torch.nn.functional.embedding(index, signs.unsqueeze(1))
        places = torch.arange(self._places(side), device=index.device)
        return ((index % len(places)).unsqueeze(-1) == places) * sign

    def _places(self, side: int) -> int:
        """How many places a side is folded to: its width, or less for a short one."""
        size, length = self.group_sizes[side], self.sides[side - 2]
        return min(self.widths[side], -(-length // size) * size)

    @property
    def _scale(self) -> float:
        return self.kept**-0.5

    def _rows(self, side: int, like: Tensor) -> Tensor:
        """Rows of the Hadamard matrix, for each group that is kept: (kept, c)."""
        return self._there("rows", side, like)

    def _signs_at(self, side: int, like: Tensor) -> Tensor:
        """The signs of a side's coordinates: (experts or 1, length)."""
        return self._there("signs", side, like)

    def _there(self, what: Drawn, side: int, like: Tensor) -> Tensor:
        """What was drawn for a side, where `like` is, and kept there.

        Its type is that of `like`, or float32 beside integers.
        """
        dtype = like.dtype if like.is_floating_point() else torch.float32
        key = what, side, like.device, dtype
        if key not in self._placed:
            drawn = self._draw_signs if what == "signs" else self._draw_rows
            self._placed[key] = drawn(side).to(like.device, dtype)
        return self._placed[key]

    @cached_property
    def _placed(self) -> dict[tuple[Drawn, int, torch.device, torch.dtype], Tensor]:
        """What was drawn, by side, device and type."""
        return {}

    def _draw_rows(self, side: int) -> Tensor:
        rng = CounterRandom(self.seed, f"groups/{side}/{self.stream}")
        order = rng.permutation(self.groups)[: self.kept]
        columns = self._places(side) // self.group_sizes[side]
        return hadamard_matrix(self.groups)[order, :columns]

    def _draw_signs(self, side: int) -> Tensor:
        experts = self.sides[0] if len(self.sides) == 3 else 1
        rng = CounterRandom(self.seed, f"sides/{side}/{self.stream}")
        return folding_signs(experts * self.sides[side - 2], rng).view(experts, -1)
