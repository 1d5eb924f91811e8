"""The covariance of a store's rows, and the method that solves with it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.methods import Preconditioned
from hf_sketch.attribution.shares import RowShare
from hf_sketch.store.blocks import formatted

_logger = logging.getLogger(__name__)
_FULL = 0.8  # of out_size: from here on longer rows would tell more


@dataclass(eq=False)
class Covariance:
    """The mean of r r^T over a store's rows r, taken when it is first needed.

    Args:
        dataset: all rows of the store.
    """

    dataset: Dataset
    _moments: "Moments | None" = None
    _methods: dict[float, Preconditioned] = field(default_factory=dict)

    def method(
        self, damping: float, split: bool, shape: Sequence[int]
    ) -> Preconditioned:
        """Return the method that solves with it, made once for each damping.

        Args:
            damping: see `Preconditioned`.
            split: whether processes share the pass over the rows.
            shape: shape of a row, see `covariance`.
        """
        if damping not in self._methods:
            moments = self._of_all(split, shape)
            made = Preconditioned(moments.mean, example_count(self.dataset), damping)
            _log_dimension(made)
            self._methods[damping] = made
        return self._methods[damping]

    def without(self, rows: Dataset, shape: Sequence[int]) -> Preconditioned:
        """Return the method of the other rows, with a damping of 1.

        Args:
            rows: all those of some examples.
            shape: shape of a row, see `covariance`.

        Raises:
            ValueError: no other example is there.
        """
        every, part = self._of_all(False, shape), covariance(RowShare(rows), shape)
        examples = example_count(self.dataset) - example_count(rows)
        if examples < 1:
            raise ValueError(
                f"some examples must stay, got all {example_count(rows)} to remove: "
                "name fewer of them."
            )
        staying = Moments(every.total - part.total, every.count - part.count)
        return Preconditioned(staying.mean, examples)

    def _of_all(self, split: bool, shape: Sequence[int]) -> "Moments":
        """Take it in one pass, at the first call."""
        if self._moments is None:
            share = RowShare.of_process if split else RowShare
            self._moments = covariance(share(self.dataset), shape)
        return self._moments


@dataclass(frozen=True, eq=False)
class Moments:
    """The sum of r r^T over rows r, and their number."""

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The mean of r r^T; zeros for no rows."""
        return self.total / max(1, self.count)


def example_count(dataset: Dataset) -> int:
    """Return the number of different examples, or else of rows."""
    if "example_id" not in dataset.column_names:
        return len(dataset)
    ids = formatted(dataset, "numpy", ["example_id"])["example_id"][:]
    return len(np.unique(ids))


def covariance(share: RowShare, shape: Sequence[int]) -> Moments:
    """Return the sum of r r^T over all finite rows r, float64.

    Args:
        share: the rows.
        shape: shape of each: (out_size,), or (groups, out_size) for a sum for each
            group, (groups, out_size, out_size).
    """
    sizes = *shape, shape[-1]
    total = torch.zeros(sizes, dtype=torch.float64, device=share.device)
    count = 0
    for block in share.blocks():
        sketches = block.sketches
        sketches = sketches[sketches.isfinite().all(1)]
        numbers = sketches.unflatten(1, shape).movedim(0, -1)
        total += (numbers @ numbers.mT).double()
        count += len(sketches)
    count = int(share.summed(torch.tensor(count)))
    return Moments(share.summed(total).cpu(), count)


def _log_dimension(method: Preconditioned) -> None:
    """Say how many directions the rows fill, and warn if they fill the sketch."""
    filled, size = method.effective_dimension, method.covariance[..., 0].numel()
    _logger.info("the rows fill %.0f of %d directions", filled, size)
    if filled > _FULL * size:
        _logger.warning(
            "The rows fill %.0f of the %d directions of their sketches: examples are "
            "hard to tell apart. Record with an out_size of %d.",
            filled,
            size,
            4 * size,
        )
