"""How noisy the gradients of steps are, and so how large a batch pays."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from hf_sketch.attribution.columns import column
from hf_sketch.sketches.choices import check_count, check_setting
from hf_sketch.store.blocks import row_blocks
from hf_sketch.store.header import read_header

Array = np.ndarray[Any, Any]

LEAST: int = 10  # steps that an interval needs


class RowsOfSteps(Protocol):
    """Rows of examples and of steps, and where they lie."""

    @property
    def dataset(self) -> Dataset:
        """The rows of examples."""
        ...

    @property
    def steps(self) -> Dataset | None:
        """The rows of steps, if there are any."""
        ...

    @property
    def directory(self) -> Path | None:
        """The store."""
        ...


def noise_scale(
    self: RowsOfSteps,
    *,
    window: int = 100,
    confidence: float = 0.95,
    train_rows: int | None = None,
) -> Dataset:
    """Return each step's gradient noise scale, smoothed, with an interval.

    With Sigma the covariance of one example's gradient and G their mean over the
    training set, the simple noise scale tr(Sigma) / |G|^2 is the batch size at which a
    step has as much noise as signal. Below it, a batch twice as large nearly halves the
    number of steps; far above it, it saves none. docs/noise.md compares it with
    measured critical batches.

    Of one step with B examples, gradient g and contributions c = B * weight * row,

        tr(Sigma) = (mean |c|^2 - |g|^2) B / (B - 1)
        |G|^2 = |g|^2 - tr(Sigma) (1 / B - 1 / N)

    without bias, for B of N training rows drawn without replacement. Their ratio is
    taken of means over the last `window` recorded steps; its interval is Fieller's, for
    the ratio of two means, and has no upper end where noise hides the mean gradient.

    Args:
        self: the store, with rows of steps and of examples.
        window: recorded steps that are averaged.
        confidence: confidence of the interval, in (0, 1).
        train_rows: N; by default what the store says of the training set, or infinity.

    Returns:
        one line per recorded step with at least two examples, in order: step, epoch,
        learning_rate, step_examples (B), noise and signal (tr(Sigma) and |G|^2 of this
        step alone, which may be negative), noise_scale (smoothed; infinite where the
        mean signal is not positive), low and high (NaN before the tenth step).

    Raises:
        ValueError: a setting is out of range, or rows of steps or of examples are
            missing, or a step has two rows.

    Reference:
        McCandlish et al. 2018, arXiv:1812.06162, eq. (2.9) and appendix A.1; Fieller
        1954, "Some problems in interval estimation".
    """
    check_count("window", window, least=LEAST)
    check_count("train_rows", train_rows, least=2, optional=True)
    check_setting("confidence", 0 < confidence < 1, "in (0, 1)", confidence)
    steps = _steps_of(self)
    if train_rows is None and self.directory is not None:
        train_rows = read_header(self.directory).train_rows
    places, counts, mean_squares = _contributions(self.dataset, steps)
    squares = _squares(steps)[places]
    noise = (mean_squares - squares) * counts / (counts - 1)
    signal = squares - noise * (1 / counts - (1 / train_rows if train_rows else 0))
    finite = np.isfinite(noise) & np.isfinite(signal)
    places, counts = places[finite], counts[finite]
    pairs = np.stack([noise[finite], signal[finite]])
    quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
    smoothed = np.array(
        [
            ratio_of_means(pairs[:, max(0, end - window) : end], quantile)
            for end in range(1, len(places) + 1)
        ]
    ).reshape(-1, 3)
    lines = {
        **{n: column(steps, n)[places] for n in ("step", "epoch", "learning_rate")},
        "step_examples": counts,
        "noise": pairs[0],
        "signal": pairs[1],
        **dict(zip(("noise_scale", "low", "high"), smoothed.T, strict=True)),
    }
    return Dataset(InMemoryTable(pa.table(lines)))


def has_parts(examples: Dataset) -> bool:
    """Return whether rows are of parts of examples, as with `per_row=True`."""
    known = "part" in examples.column_names
    return known and bool(column(examples, "part").any())


def _steps_of(rows: RowsOfSteps) -> Dataset:
    """Return the rows of steps, if they give the noise scale.

    Raises:
        ValueError: rows of steps or of examples are missing, a step has two rows, or an
            example several parts.
    """
    if rows.steps is None or not len(rows.steps) or "step" not in rows.dataset.features:
        raise ValueError(
            "The noise scale needs rows of steps and of examples, recorded together. "
            "Record with GradientSketchCallback(per_step=True, per_example=True)."
        )
    if len(np.unique(column(rows.steps, "step"))) < len(rows.steps):
        raise ValueError(
            "The store has several rows of one step, perhaps of several runs. Call "
            "noise_scale on the store of each run."
        )
    if has_parts(rows.dataset):
        raise ValueError(
            "The noise scale needs one row per example, got several parts of each. "
            "Record with GradientSketchCallback(per_row=False)."
        )
    return rows.steps


def ratio_of_means(pairs: Array, quantile: float) -> tuple[float, float, float]:
    """Return mean(x) / mean(y) of pairs, and the ends of Fieller's interval.

    Args:
        pairs: x and y, (2, n).
        quantile: quantile of the normal distribution for the two-sided confidence.

    Returns:
        the ratio, infinite where mean(y) is not positive, and the interval of positive
        ratios, (NaN, NaN) of fewer than ten pairs.
    """
    (x, y), count = pairs.mean(1), pairs.shape[1]
    ratio = float(x / y) if y > 0 else math.inf
    if count < LEAST:
        return ratio, math.nan, math.nan
    scatter = np.cov(pairs) * quantile**2 / count
    # Ratios r that are not refuted: (x - r y)^2 <= scatter of x - r y.
    a, b, c = y**2 - scatter[1, 1], x * y - scatter[0, 1], x**2 - scatter[0, 0]
    root = math.sqrt(max(b**2 - a * c, 0.0))
    ends = sorted(((b - root) / a, (b + root) / a))
    if y > 0 and a > 0:
        return ratio, max(ends[0], 0.0), max(ends[1], 0.0)
    return ratio, max(ends[1], 0.0) if c > 0 else 0.0, math.inf


def _contributions(examples: Dataset, steps: Dataset) -> tuple[Array, Array, Array]:
    """Return the steps that have examples, by place, their number and mean |c|^2."""
    numbers = column(steps, "step")
    order = numbers.argsort(kind="stable")
    entered = column(examples, "step")
    found = np.searchsorted(numbers[order], entered)
    found = np.minimum(found, len(order) - 1)
    own = numbers[order][found] == entered
    squares = (column(examples, "weight") * column(examples, "gradient_norm")) ** 2
    counts = np.bincount(found[own], minlength=len(order))
    sums = np.bincount(found[own], squares[own], minlength=len(order))
    several = np.flatnonzero(counts > 1)
    counts = counts[several]
    return order[several], counts, sums[several] * counts


def _squares(steps: Dataset) -> Array:
    """Return |g|^2 of each step's gradient before clipping, as its sketch has it."""
    parts = [
        (block.sketches / block.columns["clip_factor"].float().unsqueeze(1))
        .double()
        .square()
        .sum(1)
        for block in row_blocks(steps, "clip_factor")
    ]
    return np.concatenate([part.numpy() for part in parts])
