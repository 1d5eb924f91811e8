"""Rows as a user holds them: with the map that made them, and their scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from hf_sketch.attribution.answers import answers, check_lines, with_texts
from hf_sketch.attribution.columns import (
    described,
    matching_rows,
    row_groups,
    shown_in_html,
    with_columns,
)
from hf_sketch.attribution.covariance import Covariance
from hf_sketch.attribution.index import RowIndex, index_rows
from hf_sketch.attribution.methods import Method, OfLayers, Preconditioned, named_method
from hf_sketch.attribution.queries import query_matrix
from hf_sketch.attribution.questions.certified import certified_top
from hf_sketch.attribution.questions.duplicates import find_duplicates
from hf_sketch.attribution.questions.mislabeled import find_mislabeled
from hf_sketch.attribution.questions.noise import noise_scale
from hf_sketch.attribution.questions.spikes import find_spikes
from hf_sketch.attribution.questions.tokens import token_scores
from hf_sketch.attribution.questions.what_if import what_if
from hf_sketch.attribution.scores import dense_scores, group_scores, self_scores
from hf_sketch.attribution.shares import RowShare
from hf_sketch.attribution.sketching import sketched_rows, text_inputs
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.model.groups import Layers
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.locations import push_store


@dataclass(frozen=True, repr=False)
class GradientRows:
    """Rows, which are sketched gradients, and the map that made them.

    `len(store)` is their number, and `store[17]` are those of the example 17.

    Args:
        model_sketch: the map; `sketch_dataset` makes queries for these rows with it.
        dataset: one row per example and step; docs/format.md has its columns.
        steps: one row per optimizer step; None for rows made outside training.
        measured_error: error of inner products on the first examples, if measured.
        directory: the store; None for rows in memory.
        split: whether processes share the passes over the rows; see `over_processes`.
        recorded: the covariance of all rows, if `dataset` is only a part of them.
    """

    model_sketch: ModelSketch
    dataset: Dataset
    steps: Dataset | None = None
    measured_error: MeasuredError | None = None
    directory: Path | None = None
    split: bool = False
    recorded: Covariance | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, example_id: int) -> "GradientRows":
        return self.where(example_id=example_id)

    __repr__ = described
    _repr_html_ = shown_in_html

    def over_processes(self) -> "GradientRows":
        """The same, with each pass over the rows split among Accelerate's processes.

        Each multiplies on its own device, also if there is only one. All open the same
        store and call the same methods together.
        """
        return replace(self, split=True)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the store, and a card if there is none, to a dataset repository.

        Returns:
            the commit's address; `load_sketches(repo_id)` opens what is there.

        Raises:
            ValueError: the rows are in memory only.
        """
        return push_store(self.directory, repo_id, private, token)

    def where(self, **values: Any) -> "GradientRows":
        """Keep the rows whose columns equal the given values, e.g. `where(epoch=2)`.

        A list, set or range stands for any of its values: `where(step=range(9))`.

        Raises:
            ValueError: there is no such column, or no such row.
        """
        part = matching_rows(self.dataset, values)
        return replace(self, dataset=part, recorded=self.covariance)

    def join(
        self, dataset: Dataset, *names: str, on: str | None = None
    ) -> "GradientRows":
        """Add columns of the training set, matched by example id.

        `where` and `groups` can then use them, and `attribute` returns them.

        Args:
            dataset: the `train_dataset`.
            names: names of its columns.
            on: its column of example ids; by default an id is a row number.

        Raises:
            ValueError: an example is not in the dataset.
        """
        rows = with_columns(self.dataset, dataset, names, on)
        return replace(self, dataset=rows, recorded=self.covariance)

    def step_rows(self) -> "GradientRows":
        """Return one row per optimizer step instead, for queries of the trajectory.

        By "tracin", a score is what a step of SGD took off the loss, to first order.

        Raises:
            ValueError: there are none.
        """
        if self.steps is None or not len(self.steps):
            raise ValueError(
                "There are no rows of steps: these rows were made outside training, or "
                "with per_step=False. Record them by GradientSketchCallback."
            )
        return replace(self, dataset=self.steps, steps=None, recorded=None)

    def preconditioned(self, damping: float = 1.0) -> Preconditioned:
        """Return the method "preconditioned" with another damping.

        The covariance, with a block for each group of layers, is that of all finite
        rows of the store, also those that `where` left out. One pass takes it, once.

        Args:
            damping: positive, in units of tr(C) / number of examples.
        """
        shape = self.model_sketch.layer_groups.shape
        return self.covariance.method(damping, self.split, shape)

    def build_index(
        self,
        method: str | Method = "preconditioned",
        lists: int | None = None,
        probed: int | None = None,
    ) -> RowIndex:
        """Index single rows for approximate search, whose loss `RowIndex.recall` gives.

        Args:
            method: see `attribute`.
            lists: number of inverted lists; by default 4 * sqrt(rows).
            probed: lists that a search reads, 16 by default: more find more, slower.

        Raises:
            ModuleNotFoundError: FAISS is missing.
        """
        return index_rows(self.dataset, lambda: self.scored_by(method), lists, probed)

    def attribute(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        top_k: int = 10,
        method: str | Method = "preconditioned",
        *,
        bottom_k: int = 0,
        groups: str | None = "example_id",
        layers: Layers | None = None,
        dataset: Dataset | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> Dataset:
        """Return the examples that moved the model most for and against each query.

        A positive score marks a proponent: training on the example lowers the query's
        loss. An example's score is the sum over its rows, one per epoch that was
        recorded, or their mean for "cosine". docs/attribution.md has the formulas.

        Rows are read in one pass, besides the one that "preconditioned" takes first.
        Memory grows by 8 bytes per query and example with several rows.

        Args:
            queries: rows of the same map; or, of a model that changed, such rows by
                step: each row meets the nearest state.
            top_k: number of lines with the greatest scores.
            method: "preconditioned", "dot", "cosine", "tracin", or a method of
                `hf_sketch` with its own settings.
            bottom_k: number of lines with the least scores, the strongest opponents.
            groups: name of a column, such as "label": a line for each of its values.
                None: a line for each row, as for rows of steps, which have no examples.
            layers: names of the layer groups that scores are sums over, or weights by
                name; by default all. See `GradientSketchCallback(groups=...)`.
            dataset: the `train_dataset` with its texts; these and labels come along.
            id2label: names of its labels, if they are no `ClassLabel`.

        Returns:
            for each query its lines from the greatest score to the least: query (its
            row in `queries`), query_id, rank (from 0 for the top, from -1 for the
            bottom, as in a list), score, the columns of the row (of an example: its
            last row) and `rows`, the number of the rows that the line is about.

        Raises:
            TypeError: the queries are not sketched.
            ValueError: the queries were sketched by another map, a query is not finite,
                top_k and bottom_k are below 0 or both 0, the method is unknown or needs
                columns that are not there, or `groups` or `layers` name none there is.
        """
        check_lines(top_k, bottom_k)
        ids, matrix = query_matrix(self, queries)
        scored, counts = self.scored_by(method, layers), (top_k, bottom_k)
        lines = answers(self._share, ids, matrix, scored, groups, counts)
        return lines if dataset is None else with_texts(lines, dataset, id2label)

    def ask(
        self, model: nn.Module, processing_class: Any, text: str, **options: Any
    ) -> Dataset:
        """Return the examples behind a causal language model's mean loss on a text.

        Args:
            model: the model, at the weights that the question is about.
            processing_class: its tokenizer.
            text: the text.
            options: for `attribute`, such as `top_k` and `dataset`.

        Raises:
            ValueError: the model is of another kind; see also `attribute`.
        """
        inputs = text_inputs(model, processing_class, text)
        sketch = self.model_sketch
        rows = sketched_rows(model, inputs, sketch, processing_class=processing_class)
        return self.attribute(GradientRows(sketch, rows), **options)

    def scores(
        self,
        queries: "GradientRows | Mapping[int, GradientRows]",
        method: str | Method = "preconditioned",
        groups: str | None = None,
        layers: Layers | None = None,
    ) -> Tensor:
        """Return all scores as one matrix; see `attribute`.

        Returns:
            (queries, rows), float32, NaN for rows that are not finite; or (queries,
            groups), float64, in the order of the groups' sorted values: with
            "example_id" the scores of `attribute`.
        """
        _, matrix = query_matrix(self, queries)
        chosen = self.scored_by(method, layers)
        if groups is None:
            return dense_scores(self._share, matrix, chosen)
        grouped = row_groups(self.dataset, groups)
        return group_scores(self._share, matrix, chosen, grouped)

    def self_influence(
        self, method: str | Method = "dot", layers: Layers | None = None
    ) -> Tensor:
        """Score each row as its own query: hard and mislabelled examples score high.

        Returns:
            (rows,), float32; NaN for rows that are not finite.
        """
        return self_scores(self._share, self.scored_by(method, layers))

    # Functions of a store, one to a module, and methods of it.
    find_spikes = find_spikes
    find_mislabeled = find_mislabeled
    find_duplicates = find_duplicates
    noise_scale = noise_scale
    what_if = what_if
    certified_top = certified_top
    token_scores = token_scores

    def scored_by(self, method: str | Method, layers: Layers | None = None) -> Method:
        """Return the method of a name, checked against the rows, of some layers."""
        if method == "preconditioned":
            method = self.preconditioned()
        elif isinstance(method, str):
            method = named_method(method, self.steps)
        if problem := method.problem(self.model_sketch, self.dataset.column_names):
            raise ValueError(problem)
        if layers is None:
            return method
        return OfLayers(method, self.model_sketch.layer_groups.weights(layers))

    @property
    def _share(self) -> RowShare:
        """The rows that this process reads: all, unless they are split."""
        return (RowShare.of_process if self.split else RowShare)(self.dataset)

    @cached_property
    def covariance(self) -> Covariance:
        """The covariance of all rows of the store, taken when it is first needed."""
        return self.recorded or Covariance(self.dataset)
