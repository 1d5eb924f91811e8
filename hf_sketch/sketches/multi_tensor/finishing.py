"""How sums over long blocks become numbers of a sketch, as data for one kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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


@dataclass(frozen=True)
class FinishTransposed:
    """The transpose of a `Finish`, in float64, whose products TF32 does not round.

    Args:
        of: the tables.
        block: how many sums there are.
    """

    of: Finish
    block: int

    @classmethod
    def on(cls, device: torch.device, operator: BlockedSketch) -> "FinishTransposed":
        """Return the transpose of an operator's finish, with tables on a device."""
        found = finish_of(operator)
        moved = (
            None if x is None else x.to(device, torch.float64)
            for x in (found.weights, found.magnitudes, found.factors)
        )
        weights, drawn, factors = moved
        assert weights is not None
        places = found.places.to(device, torch.int64)
        finish = Finish(found.length, found.stride, places, weights, drawn, factors)
        return cls(finish, operator.block)

    def __call__(self, numbers: Tensor) -> Tensor:
        """Apply the transpose to the numbers of each group.

        Shapes:
            numbers (groups, out_size) -> (groups, block)
        """
        x, of = numbers.double(), self.of
        if of.factors is not None:
            right, left = of.factors
            x = pad(x, (0, -x.shape[1] % _TILE)).view(len(x), -1, 32, 32)
            x = of.weights.T @ (left.T @ x @ right).flatten(2)
            x = x.flatten(1)[:, : self.block]
        elif of.stride == 1:
            spread = (x.unsqueeze(-1) * of.weights).flatten(1)
            x = x.new_zeros(len(x), self.block)
            every = torch.arange(len(x), device=x.device).unsqueeze(1)
            # Unlike index_add_, this has one order of sums on every device.
            x.index_put_((every, of.places.flatten()), spread, accumulate=True)
        if of.magnitudes is not None:
            x = x * of.magnitudes[: x.shape[1]]
        return pad(x, (0, self.block - x.shape[1])).to(numbers.dtype)


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
