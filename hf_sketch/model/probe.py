"""The fixed gradient whose sketch identifies a map."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_ELEMENTS: Final = 2**12


def probe_of(
    shapes: Sequence[tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[Tensor, int]]:
    """Return parts of a gradient, and where they start, by name.

    They are cos(0), cos(1), ... on the first elements of the first, the last, the
    largest and the smallest parameter.
    """
    by_size = sorted(shapes, key=lambda item: math.prod(item[1]))
    probed = {shapes[0], shapes[-1], by_size[0], by_size[-1]}
    return {
        name: (torch.arange(min(math.prod(shape), _ELEMENTS)).cos(), 0)
        for name, shape in sorted(probed)
    }
