"""Scores averaged over several trainings, with their spread as an error bar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.answers import answer_lines, check_lines, with_texts
from hf_sketch.attribution.columns import EXAMPLE, query_ids, row_groups
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.scores import best_places
from hf_sketch.model.groups import Layers

_LEAST = 2


class ScoredRows(SketchedRows, Protocol):
    """Rows that give scores."""

    def scores(
        self,
        queries: Any,
        method: Any = "preconditioned",
        groups: str | None = None,
        layers: Layers | None = None,
    ) -> Tensor:
        """All scores, see `GradientRows.scores`."""
        ...


@dataclass(frozen=True, eq=False)
class CombinedScores:
    """Scores of the same queries and examples in several trainings.

    The mean and the error of a sum over examples are those of `each` summed over them,
    since errors of different examples depend on each other.

    Shapes:
        each (trainings, queries, examples), float64

    Args:
        each: the scores of each training.
        query_ids: ids of the queries, (queries,).
        values: ids of the examples, sorted, or values of another column, (examples,).
        groups: name of the column that `values` are of.
    """

    each: Tensor = field(repr=False)
    query_ids: np.ndarray[Any, Any] = field(repr=False)
    values: np.ndarray[Any, Any] = field(repr=False)
    groups: str = EXAMPLE

    @property
    def scores(self) -> Tensor:
        """The mean over the trainings, (queries, examples)."""
        return self.each.mean(0)

    @property
    def errors(self) -> Tensor:
        """The standard error of that mean: the spread over trainings / sqrt(number)."""
        return self.each.std(0) / len(self.each) ** 0.5

    def attribute(
        self,
        top_k: int = 10,
        *,
        bottom_k: int = 0,
        dataset: Dataset | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> Dataset:
        """Return the examples that score highest and lowest in the mean.

        Args:
            top_k: number of lines with the greatest scores.
            bottom_k: number of lines with the least scores.
            dataset: the `train_dataset` with its texts; these and labels come along.
            id2label: names of its labels, if they are no `ClassLabel`.

        Returns:
            for each query its lines from the greatest score to the least: query (its
            row), query_id, rank (from 0 for the top, from -1 for the bottom), score,
            the example's id, and error, the standard error of the score.

        Raises:
            ValueError: top_k and bottom_k are below 0 or both 0, or `dataset` does not
                hold an example.
        """
        check_lines(top_k, bottom_k)
        best, worst = best_places(self.scores, top_k, bottom_k)
        about = Dataset.from_dict({self.groups: self.values})
        lines = answer_lines(self.query_ids, best, worst, about)
        places = torch.cat([best.places, worst.places.flip(1)], 1)
        errors = self.errors.gather(1, places).flatten().numpy()
        lines = lines.add_column("error", errors)
        return lines if dataset is None else with_texts(lines, dataset, id2label)


def combine_scores(
    stores: Sequence[ScoredRows],
    queries: Sequence[SketchedRows | Mapping[int, SketchedRows]],
    method: str = "preconditioned",
    *,
    groups: str = EXAMPLE,
    layers: Layers | None = None,
) -> CombinedScores:
    """Average scores over several trainings on the same examples.

    Trainings that differ in their seed differ in their scores, by chance; the mean over
    some of them predicts retraining better than one does, and their spread says how
    much of a score is chance. docs/attribution.md has figures. Give each training's
    sketch a seed of its own, so that the sketches' errors average out as well.

    Args:
        stores: the rows of each training, at least two.
        queries: for each training, the same queries in the same order, sketched at its
            own model and by its store's map.
        method: name of the method, as in `GradientRows.attribute`.
        groups: name of the column whose values scores are summed over.
        layers: groups of layers, as in `GradientRows.attribute`.

    Returns:
        the scores of each training, their mean and its standard error.

    Raises:
        ValueError: there are fewer than two stores, or as many sets of queries as
            stores are missing, or the trainings have other examples or queries; see
            also `GradientRows.attribute`.

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_sketch import ModelSketch, combine_scores, sketch_dataset
        >>> ids = [[1, 2, 3], [1, 2, 4], [7, 8, 9], [1, 2, 3]]
        >>> data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        >>> stores, queries = [], []
        >>> for seed in range(3):  # in earnest, trained with this seed
        ...     _ = torch.manual_seed(seed)
        ...     config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
        ...     model = GPT2LMHeadModel(config)
        ...     sketch = ModelSketch.from_model(model, 64, seed=seed)
        ...     stores.append(sketch_dataset(model, data, sketch))
        ...     queries.append(stores[-1][0])
        >>> combined = combine_scores(stores, queries)
        >>> combined.scores.shape, combined.errors.shape
        (torch.Size([1, 4]), torch.Size([1, 4]))
        >>> sorted(combined.attribute(top_k=2)["example_id"])
        [0, 3]
    """
    if len(stores) < _LEAST or len(stores) != len(queries):
        raise ValueError(
            f"Got {len(stores)} stores and {len(queries)} sets of queries. Pass at "
            "least two stores, and the queries of each, sketched at its own model."
        )
    asked = [_ids(some) for some in queries]
    values = [row_groups(store.dataset, groups).values for store in stores]
    for what, found in (("queries", asked), (groups, values)):
        for number, other in enumerate(found):
            if not np.array_equal(other, found[0]):
                raise ValueError(
                    f"Training {number} has other {what} than training 0: "
                    f"{len(other)} and {len(found[0])} of them. Keep those that all "
                    f"have, with where(...)."
                )
    pairs = zip(stores, queries, strict=True)
    each = [store.scores(some, method, groups, layers) for store, some in pairs]
    return CombinedScores(torch.stack(each).double(), asked[0], values[0], groups)


def _ids(
    queries: SketchedRows | Mapping[int, SketchedRows],
) -> np.ndarray[Any, Any]:
    """The ids of queries, which are the same at all states of a model."""
    if isinstance(queries, Mapping):
        queries = next(iter(queries.values()))
    return query_ids(queries.dataset)
