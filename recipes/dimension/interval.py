"""The interval of the least dimension, by trainings below the one that was found."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """Trainings with several seeds in one dimension.

    Args:
        dim: dimension of the subspaces.
        best: best metric of each seed's training.
        reached: whether more than half of them reached the target.
    """

    dim: int
    best: tuple[float, ...]
    reached: bool


@dataclass(frozen=True)
class DimensionInterval:
    """Where the least dimension is that reaches the target, above `low`, up to `high`.

    Args:
        low: largest dimension that was tried and did not reach the target; 0 if all
            that were tried reached it.
        high: least dimension that reached it.
        trials: what was tried, in order.
    """

    low: int
    high: int
    trials: tuple[Trial, ...]


def bisect(
    found: int, trial_at: Callable[[int], Trial], bisections: int
) -> DimensionInterval:
    """Halve the dimension until it is too small, then bisect between the two.

    Args:
        found: dimension that reached the target.
        trial_at: trains in a dimension.
        bisections: number of dimensions that are tried, at most.
    """
    low, high, trials = 0, found, list[Trial]()
    while len(trials) < bisections and high - low > 1:
        dim = round(math.sqrt(low * high)) if low else high // 2
        if dim in (low, high):
            break
        trial = trial_at(dim)
        trials.append(trial)
        low, high = (low, dim) if trial.reached else (dim, high)
    return DimensionInterval(low, high, tuple(trials))
