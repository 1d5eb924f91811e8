"""How training rows pull against a guard set, and when that stands out."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from torch import Tensor

from hf_sketch.attribution.methods import Cosine
from hf_sketch.attribution.questions.spikes import middle_and_deviation

FILE: Final = "guard.jsonl"
MEASURES: Final[Sequence[str]] = ("opposition", "loss")


def opposition(rows: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much each row opposes the query that it opposes most.

    This is minus the smallest cosine between the row and a query. If it is positive, a
    small gradient step on the row's example raises the loss of that query.

    Shapes:
        rows (b, out_size), queries (q, out_size) -> (b,), (b,) int64

    Args:
        rows: sketches of training examples; a row of zeros opposes nothing.
        queries: sketches of the guard set, of length 1 or 0.

    Returns:
        the opposition, in [-1, 1], and which query it is to.

    Examples:
        >>> import torch
        >>> queries = torch.eye(2)
        >>> values, which = opposition(torch.tensor([[3.0, -4.0]]), queries)
        >>> [round(x, 4) for x in values.tolist()], which.tolist()
        ([0.8], [1])
    """
    least, which = (Cosine().transform(rows) @ queries.T).min(1)
    return -least, which


def culprits(values: Sequence[float], weights: Sequence[float], usual: float) -> Any:
    """Return the fewest examples without which a weighted mean is usual again.

    Args:
        values: one per example.
        weights: their weights in the mean.
        usual: what the mean of the others must not exceed.

    Returns:
        their places, those that add most to the mean first.

    Examples:
        >>> culprits([1.0, 9.0, 1.0, 6.0], [0.25] * 4, 2.0).tolist()
        [1, 3]
    """
    own = np.array(values)
    excess = np.array(weights) * (own - usual)
    order = np.argsort(-excess, kind="stable")
    missing = np.cumsum(excess[order]) < excess.sum()
    return order[: int(np.argmin(missing)) + 1]


class GuardHistory:
    """The measures of recent steps, with which the next one is compared.

    Args:
        window: number of steps, all of which must be there before a step is judged.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._values = {name: deque[float](maxlen=window) for name in MEASURES}

    def deviations(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return how far a step stands out by each measure; see `find_spikes`.

        NaN while there are too few steps to compare with, or no value.
        """
        found: dict[str, float] = dict.fromkeys(MEASURES, float("nan"))
        for name, value in values.items():
            before = self._values[name]
            if len(before) == self._window and np.isfinite(value):
                median, deviation = middle_and_deviation(np.array(before))
                found[name] = (value - median) / deviation
        return found

    def add(self, values: Mapping[str, float]) -> None:
        """Add a step, also one that stands out: the median hardly feels it."""
        for name, value in values.items():
            if np.isfinite(value):
                self._values[name].append(value)

    def usual(self, name: str) -> float:
        """Return a value one deviation above the median of a measure's recent steps."""
        return sum(middle_and_deviation(np.array(self._values[name])))
