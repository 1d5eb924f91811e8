"""How losses would differ had training not seen some of its examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.columns import (
    EXAMPLE,
    column,
    matching_rows,
    row_groups,
)
from hf_sketch.attribution.covariance import Covariance
from hf_sketch.attribution.methods import Preconditioned
from hf_sketch.attribution.queries import SketchedRows, query_matrix
from hf_sketch.attribution.scores import QueryMatrix, RowGroups, group_scores
from hf_sketch.attribution.shares import RowShare
from hf_sketch.examples.measured_error import MeasuredError

_WIDTH = 2.0  # of the parts' root sum of squares; see docs/attribution.md
_NORMAL = 1.4826  # standard deviations of a Gaussian per median absolute deviation
_SUMS_AT_ONCE = 2**24


class RecordedRows(SketchedRows, Protocol):
    """Rows, and what was measured of them."""

    @property
    def covariance(self) -> Covariance:
        """The covariance of all rows of the store."""
        ...

    @property
    def measured_error(self) -> MeasuredError | None:
        """The error of the rows' inner products, if it was measured."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class WhatIf:
    """The estimated change of losses if training had not seen some examples.

    All changes are in the unit of the queries' loss; a positive change means that the
    loss would be larger without the examples. [low, high] is a 90% interval for the
    mean change over retrainings; a single retraining adds its own noise.

    Args:
        change: change of the mean loss over the queries.
        low: lower end of its interval.
        high: upper end of its interval.
        removed: number of examples removed.
        examples: number of all examples.
        queries: one line per query: query (its row), query_id, change, low and high.
    """

    change: float
    low: float
    high: float
    removed: int
    examples: int
    queries: Dataset = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"Without {self.removed:,} of {self.examples:,} examples the mean loss of "
            f"{len(self.queries):,} queries changes by {self.change:+.3g} "
            f"(90%: {self.low:+.3g} to {self.high:+.3g})"
        )


def what_if(
    self: RecordedRows,
    remove: Iterable[int] | Mapping[str, Any],
    queries: SketchedRows | Mapping[int, SketchedRows],
) -> WhatIf:
    """Estimate how the queries' losses would differ without some examples.

    The estimate is the sum of the scores that method="preconditioned" gives the
    examples, with the covariance of the rows that stay, divided by the number of
    examples that stay. An example with several rows counts with their mean. The
    interval extends 2 (a^2 + b^2 + c^2 + d^2)^(1/2) to both sides, where

    - a is the standard deviation over the times that training saw the examples,
    - b is the root of the sum of the examples' squared effects,
    - c is the difference from the estimate with the covariance of all rows, which shows
      how far the examples' effects are from adding up,
    - d is the sketch's error of an inner product, as measured during training.

    docs/attribution.md shows how often such intervals hold the measured change, and
    when they do not: removing most of a class changes more than any linear estimate
    predicts.

    Args:
        self: the store.
        remove: ids of the examples, or values of columns as in `where`, such as
            {"source": "web"}.
        queries: rows of the same map, as in `attribute`.

    Raises:
        ValueError: no row belongs to these examples, or no example would stay; see
            also `attribute`.

    Examples:
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_sketch import ModelSketch, sketch_dataset
        >>> config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
        >>> model = GPT2LMHeadModel(config)
        >>> ids = [[1, 2, 3], [1, 2, 4], [7, 8, 9], [1, 2, 3]]
        >>> data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        >>> rows = sketch_dataset(model, data, ModelSketch.from_model(model, 64))
        >>> rows.what_if(remove=[0, 3], queries=rows[0]).change > 0
        True
    """
    values: dict[str, Any] = {EXAMPLE: [*remove]}
    if isinstance(remove, Mapping):
        values = {str(name): value for name, value in remove.items()}
    ids, matrix = query_matrix(self, queries)
    together = tuple(torch.cat([s, s.mean(0, keepdim=True)]) for s in matrix.states)
    matrix = QueryMatrix(together, matrix.steps)
    part = _Part.of(self, values)
    found = [part.effects(some) for some in matrix.split(part.queries_at_once)]
    change, spread = (torch.cat(column) for column in zip(*found, strict=True))
    low, high = change - _WIDTH * spread, change + _WIDTH * spread
    lines = {
        "query": np.arange(len(ids)),
        "query_id": ids,
        "change": change[:-1].numpy(),
        "low": low[:-1].numpy(),
        "high": high[:-1].numpy(),
    }
    return WhatIf(
        float(change[-1]),
        float(low[-1]),
        float(high[-1]),
        part.count,
        part.whole.examples,
        Dataset.from_dict(lines),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """Examples to be removed, and the scores with and without their rows.

    Args:
        rows: rows of these examples, all finite.
        whole: solves with the covariance of all rows.
        staying: solves with the covariance of the other rows.
        relative_error: relative error of inner products of sketches.
    """

    rows: Dataset
    whole: Preconditioned
    staying: Preconditioned
    relative_error: float

    @classmethod
    def of(cls, store: RecordedRows, values: Mapping[str, Any]) -> "_Part":
        """Return the part with the examples of a store that have these values."""
        ids = np.unique(column(matching_rows(store.dataset, values), EXAMPLE))
        every = store.covariance.dataset
        rows = matching_rows(every, {EXAMPLE: ids, "finite": True})
        shape = store.model_sketch.layer_groups.shape
        whole = store.covariance.method(1.0, False, shape)
        staying = store.covariance.without(rows, shape)
        measured = store.measured_error and store.measured_error.relative_error
        error = _NORMAL * measured if measured else store.model_sketch.out_size**-0.5
        return cls(rows, whole, staying, error)

    @property
    def examples(self) -> RowGroups:
        """The rows by example."""
        return row_groups(self.rows, EXAMPLE)

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.examples.count

    @property
    def queries_at_once(self) -> int:
        """The number of queries whose scores of all these examples fit in 128 MiB."""
        return max(1, _SUMS_AT_ONCE // self.count)

    def effects(self, queries: QueryMatrix) -> tuple[Tensor, Tensor]:
        """The change of each query's loss and its standard error, (queries,) each."""
        examples, times = self.examples, _times(self.rows)
        rows_met = torch.bincount(examples.codes, minlength=self.count)
        share = RowShare(self.rows)
        first = group_scores(share, queries, self.whole, examples) / rows_met
        first /= self.whole.examples
        exact = group_scores(share, queries, self.staying, examples) / rows_met
        change = exact.sum(1) / self.staying.examples
        met = torch.bincount(times.codes, minlength=times.count)
        by_time = group_scores(share, queries, self.whole, times)
        by_time *= self.count / met / self.whole.examples
        errors = [
            by_time.std(1) if times.count > 1 else torch.zeros_like(change),
            first.square().sum(1).sqrt(),
            change - first.sum(1),
            self._sketch_error(queries, rows_met[examples.codes]),
        ]
        return change, torch.stack(errors).square().sum(0).sqrt()

    def _sketch_error(self, queries: QueryMatrix, rows_met: Tensor) -> Tensor:
        """The sketch's error of the sum's product with solved queries, (queries,)."""
        total = torch.zeros(self.whole.covariance[..., 0].numel(), dtype=torch.float64)
        for block in RowShare(self.rows).blocks():
            weights = 1 / rows_met[block.start : block.start + len(block.kept)]
            total += (block.sketches.double() * weights.unsqueeze(1)).sum(0)
        solved = queries.transformed(self.whole).states
        length = torch.stack([state.double().norm(dim=1) for state in solved]).amax(0)
        return self.relative_error * length * total.norm() / self.whole.examples


def _times(rows: Dataset) -> RowGroups:
    """Group the rows by how often training had seen their example before."""
    ids = column(rows, EXAMPLE)
    order = ids.argsort(kind="stable")
    _, counts = np.unique(ids, return_counts=True)
    starts = np.repeat(counts.cumsum() - counts, counts)
    codes = np.empty(len(ids), dtype=np.int64)
    codes[order] = np.arange(len(ids)) - starts
    return RowGroups(np.unique(codes), torch.from_numpy(codes))
