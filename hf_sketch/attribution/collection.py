"""Rows as a user holds them: with the map that made them, and their scores."""

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
    check_lines,
    ids_of_states,
    matching_rows,
    query_ids,
    row_groups,
    with_columns,
)
from hf_sketch.attribution.index import RowIndex, index_rows
from hf_sketch.attribution.methods import (
    METHOD_NAMES,
    METHODS,
    Method,
    OfLayers,
    Preconditioned,
    TracIn,
)
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
from hf_sketch.model.groups import Layers
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.choices import check_choice
from hf_sketch.store.locations import push_store


@dataclass(frozen=True)
class GradientRows:
    """Rows, which are sketched gradients, and the map that made them.

    Args:
        model_sketch: the map; `sketch_dataset` makes queries for these rows with it.
        dataset: one row per example and recorded step, with the columns of
            docs/format.md.
        steps: one row per optimizer step; None for rows made outside training.
        measured_error: how far inner products of these rows are from exact ones, as
            measured on the first examples; None if it was not measured.
        directory: the store; None for rows in memory.
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
            ValueError: the rows are in memory only.
        """
        if self.directory is None:
            raise ValueError(
                "These rows are in memory only. Push those of load_sketches(output_dir)"
                ", which have a store."
            )
        return push_store(self.directory, repo_id, private, token)

    def where(self, **values: Any) -> "GradientRows":
        """Keep the rows whose columns equal the given values, e.g. `where(epoch=2)`.

        A list, set or range stands for any of its values: `where(step=range(9))`.

        Raises:
            ValueError: there is no such column, or no such row.
        """
        return replace(self, dataset=matching_rows(self.dataset, values))

    def join(
        self, dataset: Dataset, *names: str, on: str | None = None
    ) -> "GradientRows":
        """Add columns of the training set, matched by example id.

        `where` and `groups` can then use them, and `attribute` returns them.

        Args:
            dataset: the `train_dataset`.
            names: of its columns.
            on: its column of example ids; by default an id is a row number.

        Raises:
            ValueError: an example is not in the dataset.
        """
        return replace(self, dataset=with_columns(self.dataset, dataset, names, on))

    def step_rows(self) -> "GradientRows":
        """Return one row per optimizer step instead, for queries of the trajectory.

        `store.step_rows().attribute(queries, method="tracin")` shows which steps moved
        the query: the score is what the step took off its loss, for plain SGD and to
        first order.

        Raises:
            ValueError: there are none.
        """
        if self.steps is None or not len(self.steps):
            raise ValueError(
                "There are no rows of steps: these rows were made outside training, or "
                "with per_step=False. Record them by GradientSketchCallback."
            )
        return replace(self, dataset=self.steps, steps=None)

    def preconditioned(self, damping: float = 1.0) -> Preconditioned:
        """Return the method of these rows' own covariance, a block per layer group.

        One pass over all finite rows takes it; it is factorised once.

        Args:
            damping: added to the eigenvalues, in units of their mean (each block's).
        """
        shape = self.model_sketch.layer_groups.shape
        return Preconditioned(covariance(self._share, shape), damping)

    def build_index(
        self,
        method: str | Method = "dot",
        lists: int | None = None,
        probed: int | None = None,
    ) -> RowIndex:
        """Build an index for approximate search; `RowIndex.recall` measures its loss.

        Args:
            method: as in `attribute`.
            lists: number of inverted lists; by default 4 * sqrt(rows).
            probed: number of lists that a search reads, by default 16: more find more,
                and take longer.

        Raises:
            ModuleNotFoundError: the extra `faiss` is not installed.
            ValueError: the method is unknown, or a number of lists is out of range.
        """
        return index_rows(self.dataset, self.scored_by(method), lists, probed)

    def attribute(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        top_k: int = 10,
        method: str | Method = "dot",
        *,
        bottom_k: int = 0,
        groups: str | None = None,
        layers: Layers | None = None,
    ) -> Dataset:
        """Return the rows that moved the model most for and against each query.

        A positive score marks a proponent: a small gradient step on the row's example
        lowers the query's loss, with "dot" by learning rate * score to first order.

        An example met in several epochs has one row per epoch; `where(epoch=...)` picks
        one, and `groups="example_id"` sums them. Rows are read from disk in one pass;
        memory does not grow with them.

        Args:
            queries: rows of the same map; or, for a model that changed, rows at several
                of its states, keyed by step: each row meets the nearest.
            top_k: number of lines with the greatest scores.
            method: "dot", "cosine", "tracin", "preconditioned", or a method of
                `hf_sketch` with its own settings.
            bottom_k: number of lines with the least scores, the strongest opponents.
            groups: name of a column, as "label": scores are summed over the rows of
                each value, and each line is about a value instead of a row.
            layers: names of the layer groups that scores are sums over, or weights by
                name; by default all. See `GradientSketchCallback(groups=...)`.

        Returns:
            for each query its lines from the greatest score to the least: query (its
            row in `queries`), query_id, rank (from 0 for the top, from -1 for the
            bottom, as in a list), score, and the row's or group's columns.

        Raises:
            ValueError: the queries were sketched by another map, a query is not finite,
                top_k and bottom_k are below 0 or both 0, the method is unknown or needs
                columns that are not there, or `groups` or `layers` name none there is.
        """
        check_lines(top_k, bottom_k)
        ids, matrix = self._query_matrix(queries)
        chosen = self.scored_by(method, layers)
        if groups is None:
            found = best_rows(self._share, matrix, chosen, top_k, bottom_k)
            return answer_lines(ids, *found, self.dataset)
        values, codes = row_groups(self.dataset, groups)
        sums = group_scores(self._share, matrix, chosen, codes, len(values))
        best = best_groups(sums, top_k, bottom_k)
        told = {groups: values, "rows": torch.bincount(codes).numpy()}
        return answer_lines(ids, *best, Dataset.from_dict(told))

    def scores(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        method: str | Method = "dot",
        groups: str | None = None,
        layers: Layers | None = None,
    ) -> Tensor:
        """Return all scores as one matrix; see `attribute`.

        Returns:
            (queries, rows), float32, NaN for rows that are not finite; or (queries,
            groups), float64, groups in the order of their sorted values.
        """
        _, matrix = self._query_matrix(queries)
        chosen = self.scored_by(method, layers)
        if groups is None:
            return dense_scores(self._share, matrix, chosen)
        values, codes = row_groups(self.dataset, groups)
        return group_scores(self._share, matrix, chosen, codes, len(values))

    def self_influence(
        self, method: str | Method = "dot", layers: Layers | None = None
    ) -> Tensor:
        """Score each row as its own query: hard and mislabelled examples score high.

        Returns:
            (rows,), float32; NaN for rows that are not finite.
        """
        return self_scores(self._share, self.scored_by(method, layers))

    def scored_by(self, method: str | Method, layers: Layers | None = None) -> Method:
        """Return the method of a name, checked against the rows, of some layers."""
        if isinstance(method, str):
            check_choice("method", method, METHOD_NAMES)
            if method == "tracin":
                method = TracIn.of_steps(self.steps)
            else:
                method = METHODS.get(method) or self.preconditioned()
        if problem := method.problem(self.model_sketch, self.dataset.column_names):
            raise ValueError(problem)
        if layers is None:
            return method
        return OfLayers(method, self.model_sketch.layer_groups.weights(layers))

    @property
    def _share(self) -> RowShare:
        """The rows that this process reads: all, unless they are split."""
        return (RowShare.of_process if self.split else RowShare)(self.dataset)

    def _query_matrix(
        self, queries: "GradientRows | Mapping[int, GradientRows]"
    ) -> tuple[np.ndarray[Any, Any], QueryMatrix]:
        """The queries' example ids, and their sketches by state."""
        if isinstance(queries, GradientRows):
            return query_ids(queries.dataset), QueryMatrix((self._matrix(queries),))
        if "step" not in self.dataset.column_names:
            raise ValueError(
                "Queries at several states need rows with a step, got the columns "
                f"{self.dataset.column_names}. Take rows of training or of "
                "sketch_checkpoints."
            )
        states = {step: queries[step] for step in sorted(queries)}
        ids = ids_of_states({step: x.dataset for step, x in states.items()})
        matrices = tuple(map(self._matrix, states.values()))
        return ids, QueryMatrix(matrices, torch.tensor([*states]))

    def _matrix(self, queries: "GradientRows") -> Tensor:
        """Their sketches, checked: (queries, out_size)."""
        if queries.model_sketch != self.model_sketch:
            raise ValueError(
                "The queries were sketched by another map than these rows. Make them "
                "with sketch_dataset(model, data, store.model_sketch)."
            )
        return query_sketches(queries.dataset)
