"""Examples whose labels may be wrong, judging by what training recorded."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from hf_sketch.attribution.answers import with_texts
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.directions import Directions

FILE: Final = "audit.jsonl"  # of `hf-sketch audit`, beside the checkpoints

_FEATURES = Features(
    example_id=Value("int64"),
    suspicion=Value("float64"),
    excess_loss=Value("float64"),
    disagreement=Value("float64"),
    losses=List(Value("float32")),
    gradient_norm=Value("float64"),
)


def find_mislabeled(
    self: SketchedRows,
    dataset: Dataset | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Dataset:
    """Return one line per example, the one most likely mislabeled first.

    Suspicion is the mean of two figures, each in standard deviations from the mean over
    the examples, and uses neither labels nor settings:

    - excess_loss: the example's loss above the mean of its epoch, averaged over the
      recorded epochs.
    - disagreement: -sum_j d_i @ inverse(C + c 1) @ d_j over all other examples j. An
      example's direction d is the mean of its rows, each scaled to unit length (u), C
      is the mean of u u^T over all rows, and c = tr(C) / number of examples.

    If an example has no recorded loss, its suspicion is its disagreement.
    docs/audit.md shows how well this finds wrong labels. Rows are read in three passes,
    two of them in blocks of examples. Memory grows by a few numbers per example and
    row.

    Args:
        self: the store.
        dataset: the `train_dataset`; its texts and labels are added to the lines.
        id2label: names of its labels, if they are not a `ClassLabel`.

    Returns:
        example_id, suspicion, excess_loss, disagreement, losses (one per epoch from the
        first recorded to the last; NaN if the example has none there) and gradient_norm
        (mean over the example's rows).

    Raises:
        ValueError: the rows belong to steps or have no gradient, or an example is not
            in the dataset.

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from hf_sketch import ModelSketch, sketch_dataset
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = Dataset.from_dict(
        ...     {"input": [[1.0, 0.0, 4.0], [2.0, 1.0, 9.0], [3.0, 0.0, -12.0]]}
        ... )
        >>> class Squared(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.line = model
        ...     def forward(self, input):
        ...         return (self.line(input[:, :2]).squeeze(1) - input[:, 2]) ** 2
        >>> line = Squared()
        >>> rows = sketch_dataset(
        ...     line,
        ...     data.with_format("torch"),
        ...     ModelSketch.from_model(line, 2),
        ...     loss_fn=lambda out, batch: out,
        ... )
        >>> rows.find_mislabeled()["example_id"][0]
        2
    """
    directions = Directions.of_rows(self)
    codes = directions.codes.numpy()
    losses = _by_epoch(self.dataset, codes, len(directions.ids))
    norms = _means(column(self.dataset, "gradient_norm"), codes, len(directions.ids))
    with np.errstate(invalid="ignore"):
        centred = losses - _means_of(losses, 0)
    loss = _standard(_means_of(centred, 1))
    disagreement = _standard(_disagreement(directions).numpy())
    suspicion = np.where(np.isnan(loss), disagreement, (loss + disagreement) / 2)
    order = np.argsort(-suspicion, kind="stable")
    columns = {
        "example_id": directions.ids,
        "suspicion": suspicion,
        "excess_loss": loss,
        "disagreement": disagreement,
        "losses": losses,
        "gradient_norm": norms,
    }
    lines = Dataset.from_dict(
        {name: values[order] for name, values in columns.items()}, _FEATURES
    )
    return lines if dataset is None else with_texts(lines, dataset, id2label)


def _disagreement(directions: Directions) -> Tensor:
    """Return how far each example pulls away from all others, (examples,), float64."""
    metric = directions.metric(damping=1.0)
    total = sum(block.double().sum(0) for _, block in directions.blocks())
    found = torch.zeros(len(directions.ids), dtype=torch.float64)
    for examples, block in directions.blocks():
        own = block.double()
        solved = metric.transform(own)
        found[examples] = -(solved * (total - own)).sum(1) / len(directions.ids)
    return found


def _by_epoch(
    dataset: Dataset, codes: np.ndarray[Any, Any], examples: int
) -> np.ndarray[Any, Any]:
    """Each example's loss in each epoch, (examples, epochs); NaN where none is."""
    epochs = np.zeros(len(codes), dtype=np.int64)
    if "epoch" in dataset.column_names:
        epochs += column(dataset, "epoch")
        epochs -= epochs.min(initial=0 if not len(epochs) else epochs[0])
    count = int(epochs.max(initial=0)) + 1
    places = codes * count + epochs
    means = _means(column(dataset, "loss"), places, examples * count)
    return means.reshape(examples, count)


def _means(
    values: np.ndarray[Any, Any], places: np.ndarray[Any, Any], count: int
) -> np.ndarray[Any, Any]:
    """The mean of the finite values at each place; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.bincount(places[finite], values[finite], minlength=count)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(places[finite], minlength=count)


def _means_of(values: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """Means along an axis over what is not NaN; NaN where there is nothing."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def _standard(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return standard deviations from the mean, ignoring NaN; 0 if all are equal."""
    centred = values - _means_of(values, 0)
    spread = np.sqrt(_means_of(centred**2, 0))
    return centred / spread if spread > 0 else centred
