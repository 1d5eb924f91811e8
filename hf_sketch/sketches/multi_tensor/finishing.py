"""How sums over long blocks become numbers of a sketch, as data for one kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.affd import AFFD
from hf_sketch.sketches.afjl import AFJL
from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.fjl import FJL
from hf_sketch.sketches.transforms.magnitudes import magnitudes
from hf_sketch.sketches.transforms.mixing import square_factors

_TILE = 2**10
WHOLE = 2**40  # a stride for sums that are the numbers of the sketch themselves


@dataclass(frozen=True)
class Finish:
    """A product with few distinct rows, which may be rotated tile by tile.

    With the sums m, number o of the sketch is

        sum_s weights[o // stride, s] * (magnitudes * m)[places[o // stride, s] + o %
        stride]

    Args:
        length: how many numbers these are.
        stride: see above.
        places: (n, samples).
        weights: (n, samples).
        magnitudes: (block,), or None for ones.
        factors: (2, 32, 32), what each 1024 numbers are multiplied by at last, the last
            factor first; or None.
    """

    length: int
    stride: int
    places: Tensor
    weights: Tensor
    magnitudes: Tensor | None = None
    factors: Tensor | None = None


def finish_of(operator: BlockedSketch) -> Finish:
    """Return what an operator of long blocks does to their sum."""
    if isinstance(operator, FJL):
        places, weights = operator.sparse
        return Finish(operator.out_size, 1, places, weights * operator.scale)
    assert isinstance(operator, AFFD | AFJL)
    drawn = magnitudes(operator.seed, operator.mixed_shape[1], torch.device("cpu"))
    drawn = drawn * operator.scale
    if isinstance(operator, AFJL):
        return as_it_is(operator.out_size, drawn)
    factors, rest = square_factors(operator.second, 2)
    kept = -(-operator.out_size // _TILE)
    places = _TILE * torch.arange(len(rest)).expand(kept, -1)
    length = min(operator.block, kept * _TILE)
    return Finish(length, _TILE, places, rest[:kept], drawn, factors)


def as_it_is(length: int, drawn: Tensor | None = None) -> Finish:
    """Return what keeps the first numbers, times magnitudes if there are any."""
    one = torch.ones(1, 1)
    return Finish(length, WHOLE, torch.zeros_like(one), one, drawn)
