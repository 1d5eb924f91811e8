"""Rows as a user holds them: rows, the map that made them, and their scores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.columns import (
    answer_lines,
    column,
    matching_rows,
    row_groups,
    with_columns,
)
from hf_sketch.attribution.index import RowIndex, index_rows
from hf_sketch.attribution.methods import METHODS, Method, Preconditioned, TracIn
from hf_sketch.attribution.scores import (
    QueryMatrix,
    best_groups,
    best_rows,
    covariance,
    dense_scores,
    group_scores,
    query_sketches,
    self_scores,
)
from hf_sketch.attribution.shares import RowShare
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.locations import push_store


@dataclass(frozen=True)
class GradientRows:
    """Sketched gradients and the map that made them.

    Args:
        model_sketch: the map; `sketch_dataset` makes queries for these rows with it.
        dataset: one row per example and occasion, with the columns of docs/format.md.
        steps: one row per optimizer step; None for sketches made outside training.
        measured_error: how far inner products of these rows are from exact ones, as
            measured on the first examples; None if it was not measured.
        directory: the store; None for sketches in memory.
        split: whether processes share the passes over the rows; see `over_processes`.
    """

    model_sketch: ModelSketch
    dataset: Dataset
    steps: Dataset | None = None
    measured_error: MeasuredError | None = None
    directory: Path | None = None
    split: bool = False

    def over_processes(self) -> "GradientRows":
        """The same, each pass over the rows split among Accelerate's processes.

        All must have opened the same store, and call the same methods together. Each
        reads its part of the rows; all get the whole answer, whatever their number.
        """
        return replace(self, split=True)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the whole store to a dataset repository of the Hub.

        `load_sketches(repo_id)` opens it again.

        Returns:
            the commit's address.

        Raises:
            ValueError: the sketches are in memory only.
        """
        if self.directory is None:
            raise ValueError(
                "got sketches in memory: pass those of load_sketches, from disk."
            )
        return push_store(self.directory, repo_id, private, token)

    def where(self, **values: Any) -> "GradientRows":
        """The rows whose columns equal the given values, e.g. `where(epoch=2)`.

        A list, set or range is for any of its values: `where(step=range(100, 200))`.

        Raises:
            ValueError: there is no such column, or no such row.
        """
        return replace(self, dataset=matching_rows(self.dataset, values))

    def join(
        self, dataset: Dataset, *names: str, on: str | None = None
    ) -> "GradientRows":
        """Add columns of the dataset whose examples the rows are of.

        They can then be used in `where` and as `groups`, and `attribute` tells them.

        Args:
            dataset: the `train_dataset`.
            names: of its columns.
            on: its column that holds each example's example_id; by default that is the
                row's number.

        Raises:
            ValueError: an example is not in the dataset.
        """
        return replace(self, dataset=with_columns(self.dataset, dataset, names, on))

    def step_rows(self) -> "GradientRows":
        """The same with a row for each optimizer step, for queries of the trajectory.

        `store.step_rows().attribute(queries, method="tracin")` tells which steps moved
        the query: the score is what the step took off its loss, for plain SGD and to
        first order.

        Raises:
            ValueError: there are none.
        """
        if self.steps is None or not len(self.steps):
            raise ValueError(
                "there are no rows of steps, got sketches made outside of training, or "
                "with per_step=False: pass those of a GradientSketchCallback."
            )
        return replace(self, dataset=self.steps, steps=None)

    def preconditioned(self, damping: float = 1.0) -> Preconditioned:
        """The method of these rows' own covariance, for `attribute` and `scores`.

        It is taken in one pass, of all finite rows, and solved once.

        Args:
            damping: as a part of the covariance's mean eigenvalue.
        """
        return Preconditioned(covariance(self._share), damping)

    def build_index(
        self,
        method: str | Method = "dot",
        lists: int | None = None,
        probed: int | None = None,
    ) -> RowIndex:
        """An index for approximate search; `RowIndex.recall` tells how approximate.

        Args:
            method: as of `attribute`.
            lists: among which rows are dealt out; by default 4 * sqrt(rows).
            probed: lists that a search looks at, by default 16: more find more, and
                take longer.

        Raises:
            ModuleNotFoundError: the extra `faiss` is not installed.
            ValueError: the method is unknown, or a number of lists is out of range.
        """
        return index_rows(self.dataset, self._method(method), lists, probed)

    def attribute(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        top_k: int = 10,
        method: str | Method = "dot",
        *,
        bottom_k: int = 0,
        groups: str | None = None,
    ) -> Dataset:
        """The rows that moved the model most for and against each query.

        A positive score marks a proponent: a small gradient step on the row's example
        lowers the query's loss, with "dot" by learning rate * score to first order.

        An example met in several epochs has a row for each; `where(epoch=...)` picks
        one, and `groups="example_id"` sums them. Rows are read from disk in one pass;
        memory does not grow with them.

        Args:
            queries: sketched by the same map; or, for a model that changed, those at
                several of its states, by the step of each: a row meets the nearest.
            top_k: how many of the greatest scores.
            method: "dot", "cosine", "tracin", "preconditioned", or a method of
                `hf_sketch` with its own settings.
            bottom_k: how many of the least scores, the strongest opponents.
            groups: a column, as "label": scores are summed over rows of each value, and
                the lines are of these instead of rows.

        Returns:
            for each query its lines from the greatest score to the least: query (its
            row in `queries`), query_id, rank (from 0 for the top, from -1 for the
            bottom, as in a list), score, and the row's or group's columns.

        Raises:
            ValueError: the queries were sketched by another map, a query is not finite,
                top_k and bottom_k are below 0 or both 0, the method is unknown or needs
                columns that are not there, or there is no column `groups`.
        """
        if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
            raise ValueError(
                f"top_k must be at least 1, or bottom_k, got {top_k} and {bottom_k}: "
                "pass 1 or more of either."
            )
        ids, matrix = self._query_matrix(queries)
        chosen = self._method(method)
        if groups is None:
            found = best_rows(self._share, matrix, chosen, top_k, bottom_k)
            return answer_lines(ids, *found, self.dataset)
        values, codes = row_groups(self.dataset, groups)
        sums = group_scores(self._share, matrix, chosen, codes, len(values))
        told = {groups: values, "rows": torch.bincount(codes).numpy()}
        return answer_lines(
            ids, *best_groups(sums, top_k, bottom_k), Dataset.from_dict(told)
        )

    def scores(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        method: str | Method = "dot",
        groups: str | None = None,
    ) -> Tensor:
        """All scores as one matrix; see `attribute`.

        Returns:
            (queries, rows), float32, NaN for rows that are not finite; or (queries,
            groups), float64, groups in the order of their sorted values.
        """
        _, matrix = self._query_matrix(queries)
        chosen = self._method(method)
        if groups is None:
            return dense_scores(self._share, matrix, chosen)
        values, codes = row_groups(self.dataset, groups)
        return group_scores(self._share, matrix, chosen, codes, len(values))

    def self_influence(self, method: str | Method = "dot") -> Tensor:
        """Each row's score as its own query: large for hard and for mislabelled ones.

        Returns:
            (rows,), float32; NaN for rows that are not finite.
        """
        return self_scores(self._share, self._method(method))

    @property
    def _share(self) -> RowShare:
        """The rows that this process reads: all, unless they are split."""
        return (RowShare.of_process if self.split else RowShare)(self.dataset)

    def _query_matrix(
        self, queries: "GradientRows | Mapping[int, GradientRows]"
    ) -> tuple[np.ndarray[Any, Any], QueryMatrix]:
        """The queries' example ids, and their sketches by state."""
        if isinstance(queries, GradientRows):
            return _ids(queries.dataset), QueryMatrix((self._matrix(queries),))
        if "step" not in self.dataset.column_names:
            raise ValueError(
                "queries at several states need rows with a step, got the columns "
                f"{self.dataset.column_names}: take those of training, or of "
                "sketch_checkpoints."
            )
        steps = sorted(queries)
        states = [queries[step] for step in steps]
        ids = [_ids(state.dataset) for state in states]
        if not steps or any(not np.array_equal(ids[0], other) for other in ids):
            raise ValueError(
                "the same queries are needed at every state, got "
                f"{ {s: len(q.dataset) for s, q in queries.items()} } queries by step: "
                "make them with sketch_checkpoints of one dataset."
            )
        matrices = map(self._matrix, states)
        return ids[0], QueryMatrix(tuple(matrices), torch.tensor(steps))

    def _matrix(self, queries: "GradientRows") -> Tensor:
        """Their sketches, checked: (queries, out_size)."""
        if queries.model_sketch != self.model_sketch:
            raise ValueError(
                "the queries must be sketched by the map of this store, got another: "
                "make them with sketch_dataset(model, data, store.model_sketch)."
            )
        return query_sketches(queries.dataset)

    def _method(self, method: str | Method) -> Method:
        """The method of a name, checked against the rows."""
        if method == "tracin":
            method = TracIn.of_steps(self.steps)
        elif method == "preconditioned":
            method = self.preconditioned()
        elif isinstance(method, str):
            if method not in METHODS:
                names = (*METHODS, "tracin", "preconditioned")
                raise ValueError(f"method must be one of {names}, got {method!r}.")
            method = METHODS[method]
        problem = method.problem(self.model_sketch, self.dataset.column_names)
        if problem is not None:
            raise ValueError(problem)
        return method


def _ids(dataset: Dataset) -> np.ndarray[Any, Any]:
    """Of the examples, or else of the steps, that rows are of."""
    examples = "example_id" in dataset.column_names
    return column(dataset, "example_id" if examples else "step")
