"""How near the loss of a batch is to what rules say that it is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sketch.examples.rounding import tolerance

CERTAIN = 0.1  # of the tolerance: the first rule that comes so near is taken
_LOOKED_AT = 2**10  # logits, to tell their precision
_HALVES = (torch.bfloat16, torch.float16)


def read_together(*numbers: Tensor) -> list[float]:
    """Return numbers of a device, for which Python waits once."""
    return torch.stack([x.reshape(()) for x in numbers]).tolist()


def distance(got: float, expected: float, dtype: torch.dtype) -> float:
    """Return how far a loss is from a number, in tolerances; 0 if it is not finite."""
    if not math.isfinite(got):
        return 0.0
    allowed = tolerance(dtype, "loss") * max(1.0, abs(expected))
    return abs(got - expected) / allowed


def allowed_distance(logits: Tensor) -> float:
    """Return how far autocast may have rounded a float32 loss, in tolerances.

    Log-probabilities keep the type of the logits there, which float32 logits show that
    are all numbers of 16 bits. Each is off by half a unit in its last place; twice that
    is allowed.
    """
    some = logits.flatten()[:_LOOKED_AT]
    if some.dtype != torch.float32:
        return 1.0
    for half in _HALVES:
        if bool((some.to(half) == some).all()):
            return _allowed(half)
    return 1.0


def nearest(
    loss: Tensor, totals: Sequence[Tensor], logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `distance` and `allowed_distance` are for, on the device alone.

    Args:
        loss: loss of the batch.
        totals: what each rule says that it is.
        logits: the model's.

    Returns:
        the place (1,) of the first rule that is certain, else of the nearest one, and
        whether it is near enough, ().
    """
    expected = torch.stack([x.reshape(()) for x in totals])
    unit = tolerance(loss.dtype, "loss") * expected.abs().clamp(min=1)
    loss = loss.reshape(()).to(expected.device)
    far = ((loss - expected).abs() / unit).where(loss.isfinite(), 0)
    place = far.masked_fill(far <= CERTAIN, -1).argmin(keepdim=True)
    most = far.new_ones(())
    some = logits.flatten()[:_LOOKED_AT]
    for half in _HALVES[::-1] if some.dtype == torch.float32 else ():
        most = most.masked_fill((some.to(half) == some).all(), _allowed(half))
    return place, ~(far.index_select(0, place) > most.clamp(min=1)).squeeze(0)


def _allowed(half: torch.dtype) -> float:
    return torch.finfo(half).eps / tolerance(torch.float32, "loss")
