"""Sums of outer products, as the gradients of weights are."""

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy


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
    else:
        part = right.new_zeros(right.shape[0], last - first, width)
        example, token = ((left >= first) & (left < last)).nonzero(as_tuple=True)
        index = (example, left[example, token] - first)
        part.index_put_(index, right[example, token], accumulate=True)
    start = low - first * width
    return part.flatten(1)[:, start : start + high - low]


def is_touched(left: Tensor, first: int, last: int) -> bool:
    """Whether rows [first, last) of the sum of outer products can be non-zero."""
    if left.is_floating_point() or is_lazy(left):
        return True
    return bool(((left >= first) & (left < last)).any())
