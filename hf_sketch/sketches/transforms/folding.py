"""Projections that add coordinates up in turn, each with a random sign."""

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.sketches.transforms.random import CounterRandom

_MOST_TERMS = 64  # beyond, a product with the dense matrix reads memory once


def folding_signs(height: int, rng: CounterRandom) -> Tensor:
    """One random sign, +1 or -1, for each coordinate.

    Shapes:
        returns (height,), float32, on the CPU.
    """
    return 1 - 2 * (rng.words(0, height) & 1).to(torch.float32)


def folding_columns(signs: Tensor, width: int) -> Tensor:
    """The projection as a dense matrix: coordinate i adds to coordinate i mod width.

    Shapes:
        signs (height,) -> (height, width)
    """
    places = torch.arange(len(signs), device=signs.device) % width
    matrix = signs.new_zeros(len(signs), width)
    return matrix.scatter_(1, places.unsqueeze(1), signs.unsqueeze(1))


def fold(x: Tensor, signs: Tensor, width: int) -> Tensor:
    """Project the last dimension; the cost is that of reading it.

    Shapes:
        x (..., height), signs (height,) -> (..., width)
    """
    if len(signs) > _MOST_TERMS * width:
        return x @ folding_columns(signs, width)
    return add_up(x, signs, width)


def add_up(x: Tensor, signs: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """`fold` by additions alone; an x that is shorter than `width` keeps its length.

    Shapes:
        x (..., height), signs (height,) or (..., height)
        returns (..., at most width), in `out` if that is given
    """
    height = x.shape[-1]
    if height > width and is_lazy(x):
        # One sum: a program of many small ones takes long to compile.
        flipped = torch.nn.functional.pad(x * signs, (0, -height % width))
        return flipped.unflatten(-1, (-1, width)).sum(-2)
    folded = torch.mul(x[..., :width], signs[..., :width], out=out)
    for start in range(width, height, width):
        part = x[..., start : start + width]
        place = folded[..., : part.shape[-1]]
        place.addcmul_(part, signs[..., start : start + width])
    return folded


def fold_rows(rows: Tensor, signs: Tensor, first: int, places: int) -> Tensor:
    """Fold a matrix's rows, those from `first` on: (b, rows, n) -> (b, places, n)."""
    folded = rows.new_zeros(len(rows), places, rows.shape[2])
    low, last = first, first + rows.shape[1]
    signs = signs.unsqueeze(1)
    while low < last:
        place = low % places
        high = min(last, low + places - place)
        part = rows[:, low - first : high - first]
        folded[:, place : place + high - low].addcmul_(part, signs[low:high])
        low = high
    return folded
