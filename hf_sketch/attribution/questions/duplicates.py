"""Pairs of examples that trained the model in the same direction."""

from collections.abc import Iterator
from typing import Protocol

import torch
from datasets import Dataset, Features, Value
from torch import Tensor

from hf_sketch.attribution.methods import Preconditioned
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.directions import Directions
from hf_sketch.examples.measured_error import MeasuredError

_DAMPING = 0.1  # of the metric: less than for scores, to distinguish examples
_SHARE = 0.75  # of the similarity of an example with itself
_LEAST = 0.1  # the smallest similarity with itself that is assumed
_FEATURES = Features(
    example_id=Value("int64"), other_id=Value("int64"), cosine=Value("float32")
)


class MeasuredRows(SketchedRows, Protocol):
    """Rows, and the error of their inner products."""

    @property
    def measured_error(self) -> MeasuredError | None:
        """The error, if it was measured."""
        ...


def find_duplicates(
    self: MeasuredRows, threshold: float | None = None, max_pairs: int = 100_000
) -> Dataset:
    """Return the pairs of examples that trained the model in the same direction.

    An example's direction is the mean of its rows, each scaled to unit length (u). The
    cosine of two directions is taken in the metric inverse(C + 0.1 c 1), where C is the
    mean of u u^T over all rows and c = tr(C) / number of examples. In this metric,
    sharing what many examples share, such as a label, makes no duplicates. Copies with
    different labels pull in different directions and are not found.

    Time grows with the square of the number of examples. Rows are read in blocks, and
    two blocks are in memory at once (256 MiB).

    Args:
        self: the store.
        threshold: smallest cosine of a pair. Defaults to 0.75 times the cosine that a
            copy would have, as measured on the store: the mean cosine between an
            example's rows from different epochs. Changes of the model, dropout and the
            sketch keep it below 1. If each example has one row, that cosine is taken as
            1 minus the relative error in `measured_error`.
        max_pairs: largest number of pairs to return; the largest cosines are kept.

    Returns:
        one line per pair, the largest cosine first: example_id (the smaller id),
        other_id and cosine.

    Raises:
        ValueError: the rows belong to steps or have no gradient, or `threshold` is
            outside (0, 1].

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from hf_sketch import ModelSketch, sketch_dataset
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.eye(3)[[0, 1, 2, 1]].tolist()
        >>> data = Dataset.from_dict({"input": x}).with_format("torch")
        >>> rows = sketch_dataset(
        ...     model,
        ...     data,
        ...     ModelSketch.from_model(model, 8),
        ...     loss_fn=lambda out, batch: out.square().sum(1),
        ... )
        >>> rows.find_duplicates().select_columns(["example_id", "other_id"])[0]
        {'example_id': 1, 'other_id': 3}
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"threshold must be in (0, 1], got {threshold}: pass e.g. 0.9, or None."
        )
    directions = Directions.of_rows(self)
    metric = directions.metric(_DAMPING)
    if threshold is None:
        threshold = _SHARE * _of_copies(directions, metric, self.measured_error)
    pairs, cosines = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)
    for some, found in _similar(directions, metric, threshold):
        pairs, cosines = torch.cat([pairs, some]), torch.cat([cosines, found])
        order = cosines.argsort(descending=True, stable=True)[:max_pairs]
        pairs, cosines = pairs[order], cosines[order]
    ids = directions.ids[pairs.numpy()]
    columns = {"example_id": ids[:, 0], "other_id": ids[:, 1]}
    return Dataset.from_dict({**columns, "cosine": cosines.numpy()}, _FEATURES)


def _similar(
    directions: Directions, metric: Preconditioned, threshold: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of examples (n, 2), the earlier first, and their cosines (n,)."""
    norms = torch.zeros(len(directions.ids))
    for examples, block in directions.blocks():
        solved = metric.transform(block)
        norms[examples] = (solved * block).sum(1).clamp(min=0).sqrt()
        scaled = solved / norms[examples].unsqueeze(1)
        for start in range(0, examples.stop, directions.at_once):
            other = block if start == examples.start else directions.block(start)
            cosines = (
                scaled @ (other / norms[start : start + len(other)].unsqueeze(1)).T
            )
            if start == examples.start:
                cosines = cosines.tril(-1)  # NaN, of examples without a gradient, stays
            later, earlier = (cosines >= threshold).nonzero().unbind(1)
            places = torch.stack([earlier + start, later + examples.start], 1)
            yield places, cosines[later, earlier]


def _of_copies(
    directions: Directions, metric: Preconditioned, error: MeasuredError | None
) -> float:
    """The cosine that a copy would have with its example, measured on one block."""
    block, counts = directions.block(0), directions.counts[: directions.at_once]
    own = torch.zeros(len(block), dtype=torch.float64)
    for here, unit in directions.rows(0):
        squares = (metric.transform(unit) * unit).sum(1)
        own.index_add_(0, here, squares.double())
    squares = (metric.transform(block) * block).sum(1).double()
    several = counts > 1
    if not bool(several.any()):
        return 1 - ((error and error.relative_error) or 0.0)
    count = counts[several].double()
    # The mean inner product of two different rows of an example.
    between = (count**2 * squares[several] - own[several]) / (count * (count - 1))
    return max(_LEAST, min(1.0, float(between.sum() / squares[several].sum())))
