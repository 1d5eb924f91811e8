"""Sums of outer products, as the gradients of weights are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy, reads_freely

_ELEMENTS = 2**20


@dataclass(frozen=True)
class Side:
    """One side of the outer products whose sum per example is sketched.

    Args:
        numbers: (b, t, length); or integers (b, t), which stand for one-hot vectors.
        folded: the operator of their parameter has folded them.
        expert: (b, t), in which matrix each product is; None if there is a single one.
        scale: factors of the vectors' elements, (length,) or, one expert's after the
            other's, (experts * length,); None for ones.
        turned: it has also rotated them: (b * groups, t, size of a group).
    """

    numbers: Tensor
    folded: bool = False
    expert: Tensor | None = None
    scale: Tensor | None = None
    turned: bool = False

    def folded_by(self, fold: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """Return the side as `fold` folds it, which knows nothing of scales."""
        x = self.numbers
        if not x.is_floating_point():
            scale = 1.0 if self.scale is None else self.scale[x].unsqueeze(-1)
            return fold(x) * scale
        x = x.to(dtype)
        if self.folded:
            return x
        return fold(x if self.scale is None else x * self.scale)

    def split(self, examples: int) -> Iterator["Side"]:
        """Yield the side of some examples after the other."""
        count = len(self.numbers)
        for start in range(0, count, examples):
            some = slice(start, start + examples)
            expert = None if self.expert is None else self.expert[some]
            yield replace(self, numbers=self.numbers[some], expert=expert)


def form_outer(left: Tensor, right: Tensor, low: int, high: int) -> Tensor:
    """Elements [low, high) of the flattened sum_t left_t (x) right_t of each example.

    Shapes:
        left (b, t, m) or integer (b, t) for one-hot vectors, right (b, t, n)
        returns (b, high - low)
    """
    width = right.shape[-1]
    first, last = low // width, -(-high // width)
    if left.is_floating_point():
        part = torch.matmul(left[:, :, first:last].transpose(1, 2), right)
    elif is_lazy(left):
        inside = (left >= first) & (left < last)
        places = (left - first).where(inside, 0).unsqueeze(-1).expand_as(right)
        part = right.new_zeros(right.shape[0], last - first, width)
        part.scatter_add_(1, places, right * inside.unsqueeze(-1))
    elif not reads_freely(left):  # or Python would wait to know how many are inside
        inside = (left >= first) & (left < last)
        example = torch.arange(len(left), device=left.device).unsqueeze(1)
        index = (example.expand_as(left), (left - first).where(inside, 0))
        part = right.new_zeros(right.shape[0], last - first, width)
        inside = inside.unsqueeze(-1)
        part.index_put_(index, right.where(inside, 0), accumulate=True)
    else:
        part = right.new_zeros(right.shape[0], last - first, width)
        example, token = ((left >= first) & (left < last)).nonzero(as_tuple=True)
        index = (example, left[example, token] - first)
        part.index_put_(index, right[example, token], accumulate=True)
    start = low - first * width
    return part.flatten(1)[:, start : start + high - low]


def is_touched(left: Tensor, first: int, last: int) -> bool:
    """Whether rows [first, last) of the sum of outer products can be non-zero."""
    if left.is_floating_point() or not reads_freely(left):
        return True
    return bool(((left >= first) & (left < last)).any())


@dataclass(frozen=True)
class Routed:
    """Right sides of outer products, each in the matrix of one expert.

    Args:
        sides: (t, n), the tokens of all examples.
        example: (t,), whose sum each product is of.
        expert: (t,), in which matrix.
        examples: number of examples.
        experts: number of experts.
    """

    sides: Tensor
    example: Tensor
    expert: Tensor
    examples: int
    experts: int

    def of(self, sides: Tensor) -> "Routed":
        """The same with other numbers."""
        return replace(self, sides=sides)

    def by_example(self, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right sides and experts, each (b, most tokens, ...).

        Examples with fewer tokens have zeros on both sides.
        """
        order, row, counts = _sorted(self.example, self.examples)
        shape = self.examples, max(1, int(counts.max()))
        row = row + self.example[order] * shape[1]
        left, right, expert = (
            x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            .index_copy_(0, row, x[order])
            .unflatten(0, shape)
            for x in (left, self.sides, self.expert)
        )
        return left, right, expert

    def formed(self, left: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the examples' sums of outer products; see `form_grouped`."""
        sizes = self.examples, self.experts
        return form_grouped(left, self.sides, self.example, self.expert, sizes)


def form_grouped(
    left: Tensor,
    right: Tensor,
    example: Tensor,
    group: Tensor,
    sizes: tuple[int, int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield sums of left_t (x) right_t over the t of each example and group, in parts.

    An example's sums of all groups lie one after the other. Each part is of some groups
    and has about 2**20 numbers; groups without any t are left out.

    Shapes:
        left (t, m), right (t, n), example and group (t,) integers
        yields a coordinate, and the examples' numbers from there on: (b, length)

    Args:
        left: left sides.
        right: right sides.
        example: example that each product belongs to.
        group: which one of the example's sums.
        sizes: numbers of examples and groups.
    """
    examples, groups = sizes
    width = left.shape[1] * right.shape[1]
    order, place, counts = _sorted(group * examples + example, examples * groups)
    counts = counts.view(groups, examples)
    summary = torch.stack([counts.sum(1).cumsum(0), counts.amax(1)])
    ends, longest = summary.tolist()  # of each group
    each = max(1, _ELEMENTS // (examples * width))
    for first in range(0, groups, each):
        last = min(first + each, groups)
        start, end = ends[first - 1] if first else 0, ends[last - 1]
        if start == end:
            continue
        some = order[start:end]
        row = example[some] * (last - first) + group[some] - first
        most = max(longest[first:last])
        row = row * most + place[start:end]
        shape = examples * (last - first), most
        sides = (
            x.new_zeros(shape[0] * most, x.shape[1])
            .index_copy_(0, row, x[some])
            .unflatten(0, shape)
            for x in (left, right)
        )
        product = torch.bmm(next(sides).transpose(1, 2), next(sides))
        yield first * width, product.view(examples, -1)


def _sorted(key: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of keys below `size`, each one's place among its equals, the counts."""
    key, order = torch.sort(key, stable=True)
    counts = torch.bincount(key, minlength=size)
    place = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[key]
    return order, place, counts
