"""Steps of training that stand out, and the examples that caused them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable

from hf_sketch.attribution.answers import with_texts
from hf_sketch.attribution.columns import EXAMPLE, column, taken_rows
from hf_sketch.attribution.questions.step_gradient import step_shares
from hf_sketch.sketches.choices import (
    check_count,
    check_number,
    check_setting,
)
from hf_sketch.store.blocks import sketch_matrix

Array = np.ndarray[Any, Any]

_LEAST = 10  # steps before the first one that is judged
_NORMAL = 1.4826  # standard deviations of a Gaussian per median absolute deviation
_SHORT = 0.5  # of the median number of examples
_FLOOR = 0.05  # of the median: deviations of a run that hardly varies are not spikes
_OF_STEPS = ("step", "epoch", "learning_rate", "clip_factor")
_NOT_SHOWN = (*_OF_STEPS, "sketch", "scale", "micro_step", "rank")


class RecordedRows(Protocol):
    """Rows of examples and of steps."""

    @property
    def dataset(self) -> Dataset:
        """The rows of examples."""
        ...

    @property
    def steps(self) -> Dataset | None:
        """The rows of steps, if there are any."""
        ...


def find_spikes(
    self: RecordedRows,
    *,
    threshold: float = 8.0,
    window: int = 50,
    carried: float = 0.95,
    dataset: Dataset | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Dataset:
    """Return the steps whose loss or gradient norm stands out, with their examples.

    A step stands out if its value lies more than `threshold` robust standard deviations
    above the median of the recorded steps before it. The deviation is 1.4826 times the
    median absolute deviation of those steps, and at least 5% of their median. Steps
    with fewer than 10 recorded steps before them are not judged. Neither are steps with
    fewer than half the median number of examples, often the last of an epoch, because
    their mean gradient is noisier. A step whose gradient is NaN or infinite always
    stands out.

    Each such step is listed with the fewest examples whose shares of the gradient add
    up to `carried` of all shares; see `step_shares`. If some examples' gradients are
    not finite, these are listed, with a share of NaN. docs/spikes.md has an example.

    Args:
        self: the store, with rows of steps and of examples.
        threshold: robust standard deviations above the median.
        window: number of recorded steps that a step is compared with.
        carried: part of the step's gradient that the named examples carry, in (0, 1].
        dataset: the `train_dataset`; its texts and labels are added to the lines.
        id2label: names of its labels, if they are not a `ClassLabel`.

    Returns:
        one line per step and named example, in the order of the steps and with the
        largest share first: step, epoch, learning_rate, step_loss (the weighted sum of
        its examples' losses; NaN if losses were not recorded), step_norm (the gradient
        norm before clipping), loss_deviation and norm_deviation (what `threshold` is
        compared with; NaN if not judged), clip_factor, step_examples (their number),
        share, the columns of the example's row, `spikes` (the number of these steps
        that name the example) and `rows` (the number of its rows in the store).

    Raises:
        ValueError: a setting is out of range, rows of steps or of examples are missing,
            a step has two rows, or an example is not in the dataset.
    """
    check_count("window", window, least=_LEAST)
    check_number("threshold", threshold, least=0)
    check_setting("carried", 0 < carried <= 1, "in (0, 1]", carried)
    run = _recorded_run(self.dataset, self.steps)
    by_loss = deviations_before(run.loss, window)
    by_norm = deviations_before(run.norm, window)
    short = run.counts < _SHORT * np.median(run.counts)
    by_loss[short] = by_norm[short] = np.nan
    by_norm[~np.isfinite(run.norm)] = np.inf
    # NaN, of steps that are not judged, is not greater.
    found = ((by_loss > threshold) | (by_norm > threshold)).nonzero()[0]
    named = [_carriers(run, place, carried) for place in found.tolist()]
    lines = _lines(run, found, by_loss[found], by_norm[found], named)
    return lines if dataset is None else with_texts(lines, dataset, id2label)


def deviations_before(values: Array, window: int) -> Array:
    """Return how far each value lies above the median of those before it.

    The unit is robust standard deviations, see `find_spikes`. Values with too few
    before them give NaN.

    Shapes:
        values (n,) -> (n,); values that are not finite do not enter the median
    """
    found = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        before = values[max(0, place - window) : place]
        before = before[np.isfinite(before)]
        if len(before) >= _LEAST:
            median, deviation = middle_and_deviation(before)
            found[place] = (value - median) / deviation
    return found


def middle_and_deviation(values: Array) -> tuple[float, float]:
    """Return the median of values, and their robust standard deviation.

    See `find_spikes`; the deviation is at least 5% of the median, and not 0.
    """
    median = np.median(values)
    deviation = _NORMAL * np.median(np.abs(values - median))
    least = max(_FLOOR * abs(median), np.finfo(float).tiny)
    return float(median), float(max(deviation, least))


@dataclass(frozen=True, eq=False)
class _RecordedRun:
    """The steps that have a row of their own and rows of examples, in order.

    Shapes:
        places, loss, norm (steps,)

    Args:
        examples: the rows of examples.
        steps: the rows of steps.
        rows: places of each step's rows in `examples`.
        places: place of each step in `steps`.
        loss: loss of each step, the weighted sum of its examples' losses.
        norm: norm of each step's gradient before clipping; NaN if it is not finite.
    """

    examples: Dataset
    steps: Dataset
    rows: list[Array]
    places: Array
    loss: Array
    norm: Array

    @property
    def counts(self) -> Array:
        """The number of examples of each step, (steps,)."""
        return np.array([len(own) for own in self.rows], np.int64)


def _recorded_run(examples: Dataset, steps: Dataset | None) -> _RecordedRun:
    """Match the rows of steps with those of examples."""
    if steps is None or not len(steps) or "step" not in examples.column_names:
        raise ValueError(
            "Finding spikes needs rows of steps and of examples, recorded together. "
            "Record with GradientSketchCallback(per_step=True, per_example=True)."
        )
    numbers, places = np.unique(column(steps, "step"), return_index=True)
    if len(numbers) < len(steps):
        raise ValueError(
            f"The store has {len(steps)} step rows of {len(numbers)} steps, perhaps of "
            "several runs. Call find_spikes on the store of each run."
        )
    entered = column(examples, "step")
    order = entered.argsort(kind="stable")
    met, starts = np.unique(entered[order], return_index=True)
    _, here, there = np.intersect1d(numbers, met, return_indices=True)
    by_step = np.split(order, starts[1:])
    rows = [by_step[place] for place in there]
    weights, losses = column(examples, "weight"), column(examples, "loss")
    parts = np.where(weights == 0, 0.0, weights * losses)
    places = places[here]
    finite = column(steps, "finite")[places]
    norm = np.where(finite, column(steps, "gradient_norm")[places], np.nan)
    loss = np.array([parts[own].sum() for own in rows])
    return _RecordedRun(examples, steps, rows, places, loss, norm)


def _carriers(run: _RecordedRun, place: int, carried: float) -> tuple[Array, Array]:
    """Return the rows that carry a step's gradient, and their shares of it."""
    own = run.rows[place]
    rows = sketch_matrix(run.examples.select(own))
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        return own[~finite.numpy()], np.full(int((~finite).sum()), np.nan)
    weights = torch.from_numpy(column(run.examples, "weight")[own])
    step = run.steps.select(run.places[[place]])
    gradient = sketch_matrix(step)[0] / column(step, "clip_factor")[0]
    if not bool(gradient.isfinite().all()):  # by a scale of fp16, or a factor of 0
        gradient = weights.to(rows) @ rows
    shares, order = step_shares(rows, weights, gradient).double().sort(descending=True)
    missing = shares.cumsum(0) < carried * shares.sum()
    count = int(missing.sum()) + 1
    return own[order[:count].numpy()], shares[:count].numpy()


def _lines(
    run: _RecordedRun,
    found: Array,
    by_loss: Array,
    by_norm: Array,
    named: list[tuple[Array, Array]],
) -> Dataset:
    """Return a line for each step and named example."""
    rows = np.concatenate([np.empty(0, np.int64), *(own for own, _ in named)])
    shares = np.concatenate([np.empty(0), *(own for _, own in named)])
    spike = np.repeat(np.arange(len(found)), [len(own) for own, _ in named])
    examples, at = run.examples, found[spike]
    ids = column(examples, EXAMPLE)
    mine = ids[rows]
    pairs = np.unique(np.stack([mine, spike]), axis=1)[0]  # each spike counts once
    of_spikes = {
        "step_loss": run.loss[at],
        "step_norm": run.norm[at],
        "loss_deviation": by_loss[spike],
        "norm_deviation": by_norm[spike],
        "step_examples": run.counts[at],
        "share": shares,
    }
    counts = {"spikes": _counts(pairs, mine), "rows": _counts(ids, mine)}
    names = [name for name in examples.column_names if name not in _NOT_SHOWN]
    parts = [
        taken_rows(run.steps, run.places[at], _OF_STEPS).data,
        pa.table(of_spikes),
        taken_rows(examples, rows, names).data,
        pa.table(counts),
    ]
    # Of no lines concatenate_datasets would keep the first part's columns only.
    columns = {name: part[name] for part in parts for name in part.column_names}
    return Dataset(InMemoryTable(pa.table(columns)))


def _counts(values: Array, asked: Array) -> Array:
    """Return how often each asked value is among the values."""
    known = np.sort(values)
    ends = [np.searchsorted(known, asked, side=side) for side in ("right", "left")]
    return ends[0] - ends[1]
