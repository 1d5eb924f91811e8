"""Grouped: both sides folded and rotated; one side's groups meet the other's."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sketch.sketches.grouped_side import GroupedSide
from hf_sketch.sketches.operator import SeededSketch, next_power_of_two
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.pieces import WorkingMemory
from hf_sketch.sketches.transforms.folding import fold_rows
from hf_sketch.sketches.transforms.lazy import reads_freely
from hf_sketch.sketches.transforms.random import CounterRandom
from hf_sketch.sketches.two_sided.turning import can_turn, turn

_ELEMENTS_AT_ONCE = 2**19  # of a folded side: 2 MiB stays in the cache


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

    `E <S X, S Y> = <X, Y>`. If no side is longer than its width, the variance is about

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

        A side is folded, copied and rotated, the second while the first is there.
        """
        first, second = self._places(0), self._places(1)
        return max(3 * first, first + 3 * second)

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
        left, right = self._sides_at(part)
        folded = part.new_zeros(len(part), left.places, right.places)
        low, last = first, first + rows.shape[1]
        while low < last:
            expert, row = divmod(low, height)
            high = min(last, low - row + height)
            some = rows[:, low - first : high - first]
            matrix = fold_rows(some, left.signs[expert], row, left.places)
            folded += right.of(expert).fold(Side(matrix))
            low = high
        return self._join_folded(folded)

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        *_, height, width = self.sides
        left, right = self._sides_at(rows)
        shape = (self.kept, *self.group_sizes)
        groups = rows[:, : math.prod(shape)].unflatten(1, shape)
        groups = groups.unsqueeze(2) * left.rows[:, :, None, None]
        x = torch.matmul(right.rows.T, groups.flatten(2))  # (b, d, c p q)
        x = x.unflatten(2, groups.shape[2:]).permute(0, 2, 3, 1, 4)
        x = x.flatten(3).flatten(1, 2) * self._scale
        for axis, length in ((1, height), (2, width)):
            times = [1, 1, 1]
            times[axis] = -(-length // x.shape[axis])
            x = x.repeat(times).narrow(axis, 0, length)
        x = x.unsqueeze(1) * left.signs.unsqueeze(2)
        return x.mul_(right.signs.unsqueeze(1)).flatten(1)

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
        self._add_outer_(total, Side(left), Side(right))
        return total

    def fold(self, factor: Tensor, side: int) -> Tensor:
        """Fold one side of outer products, which takes less memory then.

        Shapes:
            factor (b, t, length of the side)
            returns (b, t, at most widths[side])
        """
        return self._sides_at(factor)[side].fold(Side(factor))

    def add_outer_(
        self, rows: Tensor, left: Side, right: Side, memory: WorkingMemory
    ) -> None:
        """Add the sketch of sum_t left_t (x) right_t to rows (b, out_size), in place.

        On a CPU some examples at a time are sketched, in `memory`: to ask the system
        for more each time would take longer than the sketch.
        """
        if not reads_freely(rows):
            self._add_outer_(rows, left, right)
            return
        first, second = self._sides_at(rows)
        examples, tokens = right.numbers.shape[:2]
        lengths = tokens * first.longest, tokens * second.longest
        some = min(examples, max(1, _ELEMENTS_AT_ONCE // max(1, *lengths)))
        sizes = max(*lengths, self.out_size), *lengths
        laid, *spaces = memory.take(rows, *(some * size for size in sizes))
        parts = [(rows, left, right)]
        if some < examples:
            pieces = rows.split(some), left.split(some), right.split(some)
            parts = zip(*pieces, strict=True)
        for total, a, b in parts:
            turned = first.turn_in(a, laid, spaces[0])
            self._add_turned_(total, turned, second.turn_in(b, laid, spaces[1]), laid)

    def _add_outer_(self, rows: Tensor, left: Side, right: Side) -> None:
        """Do the same in memory of its own."""
        turned = (self._turned(x, side, rows) for side, x in enumerate((left, right)))
        self._add_turned_(rows, *turned)

    def _turned(self, x: Side, side: int, like: Tensor) -> Tensor:
        """Fold and rotate one side: (b * groups, t, size)."""
        if x.turned:
            return x.numbers
        if can_turn(x, (self, side), like):
            scales = [] if x.scale is None else [x.scale]
            return turn(x.numbers, [(self, side)], scales)[0]
        of = self._sides_at(like)[side]
        return of.turn(of.fold(x))

    def _add_turned_(
        self, rows: Tensor, left: Tensor, right: Tensor, space: Tensor | None = None
    ) -> None:
        """Add the products of the groups of both sides to rows, in place."""
        first, second = self.group_sizes
        numbers = self.kept * first * second
        # MKL takes four times as long for few columns.
        swapped = first > second and reads_freely(rows)
        if numbers == self.out_size and not swapped:
            total = rows.view(-1, first, second)
            total.baddbmm_(left.mT, right, alpha=self._scale)
            return
        total = rows[:, :numbers].unflatten(1, (self.kept, first, second))
        if swapped:
            left, right, total = right, left, total.mT
        out = None
        if space is not None:
            out = space[: len(rows) * numbers].view(-1, *total.shape[2:])
        product = torch.bmm(left.mT, right, out=out)
        total.add_(product.view(total.shape), alpha=self._scale)

    def _join_folded(self, matrix: Tensor) -> Tensor:
        """The sketch of a matrix that is folded along both sides."""
        left, right = self._sides_at(matrix)
        examples, first = len(matrix), self.group_sizes[0]
        turned = right.turn(matrix)
        # (b, k, c p q), of which H_1's row k takes the sum over c
        turned = turned.view(examples, self.kept, left.places // first, -1)
        groups = torch.matmul(left.rows.unsqueeze(1), turned).flatten(1)
        missing = self.out_size - groups.shape[1]
        return torch.nn.functional.pad(groups * self._scale, (0, missing))

    def _places(self, side: int) -> int:
        """How many places a side is folded to: its width, or less for a short one."""
        size, length = self.group_sizes[side], self.sides[side - 2]
        return min(self.widths[side], -(-length // size) * size)

    @property
    def _scale(self) -> float:
        return self.kept**-0.5

    def _sides_at(self, like: Tensor) -> tuple[GroupedSide, GroupedSide]:
        """What was drawn for both sides, where `like` is, and kept there.

        Its type is that of `like`, or float32 beside integers.
        """
        dtype = like.dtype if like.is_floating_point() else torch.float32
        key = like.device, dtype
        if key not in self._placed:
            first, second = (
                GroupedSide.drawn(self, side, self._places(side)) for side in (0, 1)
            )
            self._placed[key] = first.to(*key), second.to(*key)
        return self._placed[key]

    @cached_property
    def _placed(
        self,
    ) -> dict[tuple[torch.device, torch.dtype], tuple[GroupedSide, GroupedSide]]:
        """What was drawn, by device and type."""
        return {}

    def group_order(self, side: int) -> Tensor:
        """The row of the Hadamard matrix that each kept group has, on the CPU."""
        rng = CounterRandom(self.seed, f"groups/{side}/{self.stream}")
        return rng.permutation(self.groups)[: self.kept]

    def side_signs(self, side: int) -> CounterRandom:
        """The generator of a side's signs: those of experts lie end to end."""
        return CounterRandom(self.seed, f"sides/{side}/{self.stream}")
