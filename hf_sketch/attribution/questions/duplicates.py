"""Pairs of examples that taught the model the same."""

from collections.abc import Iterator
from typing import Protocol

import torch
from datasets import Dataset, Features, Value
from torch import Tensor

from hf_sketch.attribution.methods import Preconditioned
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.directions import Directions
from hf_sketch.examples.measured_error import MeasuredError

_DAMPING = 0.1  # of the metric: less than for scores, to tell examples apart
_SHARE = 0.75  # of the similarity of an example with itself
_LEAST = 0.1  # similarity with itself that is taken for one
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

    An example's direction is the mean of its rows u at unit length. The cosine of two
    directions is taken in the metric inverse(C + 0.1 c 1), C the mean of u u^T over all
    rows and c = tr(C) / number of examples: what many examples share, such as a label,
    makes no duplicates. Copies with different labels pull apart and are not found.

    Time grows with the square of the number of examples. Rows are read in blocks, two
    of which are held at once (256 MiB).

    Args:
        self: the store.
        threshold: least cosine of a pair. By default 0.75 times the cosine that a copy
            would have, as measured on the store: the mean cosine of an example's rows
            of different epochs, which changes of the model, dropout and the sketch keep
            below 1. Where each example has one row it is 1 - `measured_error`.
        max_pairs: number of pairs to return at most; those of the greatest cosines.

    Returns:
        one line per pair, from the greatest cosine to the least: example_id (the
        lesser), other_id and cosine.

    Raises:
        ValueError: the rows are of steps or have no gradient, or `threshold` is outside
            (0, 1].

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
    """By blocks, pairs of examples (n, 2), the lesser first, and their cosines (n,)."""
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
    """The cosine that an example's copy would have with it, by those of one block."""
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
