"""Magnitudes of a Gaussian diagonal, held for short blocks, redrawn for long ones."""

from functools import lru_cache

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.random import CounterRandom, drawing

_LONGEST_HELD = 2**18


def weigh_(x: Tensor, seed: int, scale: float) -> Tensor:
    """Multiply column i of x by |g_i| * scale, in place.

    The magnitudes depend on the seed and i alone.

    Shapes:
        x (b, n)
    """
    if x.shape[1] <= _LONGEST_HELD:
        return x.mul_(magnitudes(seed, x.shape[1], x.device).to(x) * scale)
    rng = CounterRandom(seed, "gaussian")
    for low in range(0, x.shape[1], _LONGEST_HELD):
        part = x[:, low : low + _LONGEST_HELD]
        drawn = rng.normals(low, part.shape[1], drawing(x.device))
        part.mul_(drawn.abs().to(x) * scale)
    return x


@lru_cache(maxsize=8)  # a memo of a pure function: at most 1 MiB each
def magnitudes(seed: int, size: int, device: torch.device) -> Tensor:
    """Return |g_i| of the first columns: (size,), float32."""
    return CounterRandom(seed, "gaussian").normals(0, size).abs().to(device)
