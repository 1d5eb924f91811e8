"""The rows with the greatest exact scores, found by way of their sketches."""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sketch.attribution.columns import EXAMPLE, column
from hf_sketch.attribution.methods import Cosine
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.exact_products import ExactGradients, HeldGradients
from hf_sketch.attribution.scores import QueryMatrix, best_places, dense_scores
from hf_sketch.attribution.shares import RowShare
from hf_sketch.attribution.sketching import collate_for
from hf_sketch.examples.sketcher import ExampleLossFunction
from hf_sketch.model.state import evaluation_mode
from hf_sketch.sketches import CounterRandom
from hf_sketch.sketches.choices import check_choice, check_count, check_setting
from hf_sketch.store.blocks import sketch_matrix

METHODS = ("dot", "cosine")
_LEAST_SAMPLE = 16
_OFF = 0.1  # relative distance of a row from its gradient's sketch, int8 included


@dataclass(frozen=True, eq=False, repr=False)
class CertifiedTop:
    """The rows with the greatest exact scores of each query.

    Args:
        lines: each query's rows, the greatest score first: query, rank, score
            (exact) and example_id.
        confidence: for each query, the probability that none of its top rows is
            missing.
        rows: number of rows.
        computed: number of rows whose exact gradients were computed.
        examined: number of rows whose bound was high enough, by query, (queries,).
        errors: standard deviation of sketched cosines as measured on random rows, by
            query, (queries,).
    """

    lines: Dataset = field(repr=False)
    confidence: float
    rows: int
    computed: int
    examined: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"Exact top rows of {len(self.examined):,} queries, each complete with "
            f"probability {self.confidence:.4g}. {self.computed:,} of {self.rows:,} "
            "exact gradients were computed."
        )


def certified_top(
    self: SketchedRows,
    model: nn.Module,
    dataset: Any,
    queries: Any,
    top_k: int = 10,
    *,
    method: Literal["dot", "cosine"] = "dot",
    confidence: float = 0.99,
    sample: int = 64,
    seed: int = 0,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    processing_class: Any = None,
    loss_fn: ExampleLossFunction | None = None,
) -> CertifiedTop:
    """Return the rows with the greatest exact scores, at a fraction of their cost.

    Exact scores are inner products or cosines of whole gradients, for which the model
    runs on each example by itself. Sketches choose the rows that need it. Their error
    is measured first, on `sample` random rows. A row is left out if its sketched cosine
    plus w (1 + cosine^2)^(1/2) is too small for the top, where w is the error's
    standard deviation times a quantile of Student's t: each of the true top rows is
    left out with a probability of at most (1 - confidence) / top_k. This takes errors
    for Gaussian, and as large in proportion for rows at the top as for random ones;
    docs/attribution.md shows trials.

    Args:
        self: one row per example, sketched at the model's present weights by
            `sketch_dataset`, or those of a training's step with a checkpoint.
        model: the model.
        dataset: the examples of the rows, by example id, as for `sketch_dataset`.
        queries: examples to ask of, as for `sketch_dataset`. Their exact gradients are
            held in memory together.
        top_k: rows per query.
        method: "dot" for inner products, "cosine" for cosines.
        confidence: for each query, the probability that none of its top rows is
            missing; in (0, 1).
        sample: number of random rows that the error is measured on, at least 16.
        seed: seed of the random choice.
        data_collator: see `sketch_dataset`.
        processing_class: see `sketch_dataset`.
        loss_fn: see `sketch_dataset`.

    Returns:
        the rows of each query with exact scores, and how many were computed.

    Raises:
        ValueError: there are no rows or no queries, an example has several rows, a row
            is not finite, a query's gradient is zero, a gradient is not finite, or a
            row is not the sketch of its example's gradient at the model's weights; or a
            setting is out of range.

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_sketch import ModelSketch, sketch_dataset
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
        >>> model = GPT2LMHeadModel(config)
        >>> ids = [[i, i % 7, i % 5, 9] for i in range(40)]
        >>> data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        >>> rows = sketch_dataset(model, data, ModelSketch.from_model(model, 512))
        >>> found = rows.certified_top(model, data, data.select([3]), 2, sample=16)
        >>> found.lines["example_id"][0]
        3
        >>> found.computed < 40
        True
    """
    check_choice("method", method, METHODS)
    check_count("top_k", top_k)
    check_count("sample", sample, _LEAST_SAMPLE)
    check_setting("confidence", 0 < confidence < 1, "between 0 and 1", confidence)
    collate = collate_for(model, data_collator, processing_class)
    gradients = ExactGradients(model, self.model_sketch, collate, loss_fn)
    with evaluation_mode(model):
        search = _Search.of(self, gradients, dataset, queries, method)
        count = len(search.ids)
        order = CounterRandom(seed, "certified").permutation(count)[:sample]
        for place in tqdm(order.tolist(), desc="Measuring the error", unit="row"):
            search.compute(place, check=True)
        errors = search.errors(order)
        miss = (1 - confidence) / min(top_k, count)
        width = _student(1 - miss, len(order)) * errors
        examined = [
            search.complete(number, min(top_k, count), float(width[number]))
            for number in tqdm(range(len(errors)), desc="Exact scores", unit="query")
        ]
    lines = search.lines(min(top_k, count))
    computed = int(search.known.sum())
    numbers = torch.tensor(examined)
    return CertifiedTop(lines, confidence, count, computed, numbers, errors)


@dataclass(eq=False)
class _Search:
    """Exact scores of some rows, and bounds on those of the others.

    Scores are divided by the query's norm. By sketch they are known as `cosines` times
    `scale`. The variance of a cosine c grows like 1 + c^2, as with a Gaussian matrix.

    Shapes:
        cosines, scores (queries, rows); ids, scale, known (rows,); norms (queries,)
    """

    rows: SketchedRows
    gradients: ExactGradients
    dataset: Any
    held: HeldGradients
    norms: Tensor
    cosines: Tensor
    scale: Tensor
    ids: np.ndarray[Any, Any]
    method: str
    scores: Tensor = field(init=False)
    known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scores = torch.full_like(self.cosines, -torch.inf)
        self.known = torch.zeros(len(self.ids), dtype=torch.bool)

    @classmethod
    def of(
        cls,
        rows: SketchedRows,
        gradients: ExactGradients,
        dataset: Any,
        queries: Any,
        method: str,
    ) -> "_Search":
        """Sketch the queries, and hold their exact gradients."""
        ids = column(rows.dataset, EXAMPLE)
        if len(np.unique(ids)) < len(ids) or not column(rows.dataset, "finite").all():
            raise ValueError(
                "Exact scores need one finite row per example, got "
                f"{len(ids)} rows of {len(np.unique(ids))} examples. Keep those of one "
                "state of the model with where(step=..., finite=True)."
            )
        if not len(ids) or not len(queries):
            raise ValueError(
                f"Exact scores need rows and queries, got {len(ids)} rows and "
                f"{len(queries)} queries."
            )
        exact = [gradients.of(query) for query in queries]
        sketches = torch.stack([rows.model_sketch.sketch(x) for x in exact]).cpu()
        matrix = QueryMatrix((sketches.float(),))
        cosines = dense_scores(RowShare(rows.dataset), matrix, Cosine()).double()
        held = gradients.held(exact)
        norms = _usable(held.norms())
        scale = torch.ones(len(ids), dtype=torch.float64)
        if method == "dot":
            scale = torch.from_numpy(column(rows.dataset, "gradient_norm")).double()
        return cls(rows, gradients, dataset, held, norms, cosines, scale, ids, method)

    def compute(self, place: int, check: bool = False) -> None:
        """Compute the exact scores of a row, unless they are known."""
        if self.known[place]:
            return
        gradient = self.gradients.of(self.dataset[int(self.ids[place])])
        if check:
            self._check(place, gradient)
        products, norm = self.gradients.products(self.held, gradient)
        if not math.isfinite(norm):
            raise ValueError(
                f"The gradient of example {self.ids[place]} is not finite at the "
                "model's weights. Pass the checkpoint that the rows were sketched at."
            )
        scores = products / self.norms
        if self.method == "cosine" and norm > 0:  # a zero's cosine is 0, as sketched
            scores = scores / norm
        self.scores[:, place] = scores
        self.known[place] = True

    def errors(self, places: Tensor) -> Tensor:
        """Return the standard deviation of sketched cosines near 0, (queries,).

        It is that of the query's own, or of all queries' if this is larger.
        """
        cosines = self.cosines[:, places]
        exact = self.scores[:, places] / self.scale[places].clamp(min=1e-30)
        squares = (cosines - exact).square() / (1 + cosines.square())
        return squares.mean(1).clamp(min=squares.mean()).sqrt()

    def complete(self, number: int, top_k: int, width: float) -> int:
        """Compute all rows whose score may be among a query's greatest.

        Returns:
            their number.
        """
        cosines = self.cosines[number]
        bounds = (cosines + width * (1 + cosines.square()).sqrt()) * self.scale
        order = bounds.argsort(descending=True).tolist()
        known = self.scores[number][self.known]
        best = [-torch.inf] * top_k + known.topk(min(top_k, len(known))).values.tolist()
        best = heapq.nlargest(top_k, best)[::-1]  # a heap: the least is first
        for count, place in enumerate(order):
            if bounds[place] < best[0]:
                return count
            if not self.known[place]:
                self.compute(place)
                heapq.heappushpop(best, float(self.scores[number, place]))
        return len(order)

    def lines(self, top_k: int) -> Dataset:
        """Return the rows with the greatest scores of each query."""
        best, _ = best_places(self.scores, top_k, 0)
        scores = best.scores
        if self.method == "dot":
            scores = scores * self.norms.unsqueeze(1)
        count = len(scores)
        return Dataset.from_dict(
            {
                "query": np.arange(count).repeat(top_k),
                "rank": np.tile(np.arange(top_k), count),
                "score": scores.flatten().numpy(),
                "example_id": self.ids[best.places.flatten().numpy()],
            }
        )

    def _check(self, place: int, gradient: dict[str, Tensor]) -> None:
        """Raise unless a row is the sketch of this gradient."""
        row = sketch_matrix(self.rows.dataset.select([place])).squeeze(0)
        expected = self.rows.model_sketch.sketch(gradient).cpu()
        distance = float((row - expected).norm() / expected.norm().clamp(min=1e-30))
        if not distance <= _OFF:
            raise ValueError(
                f"The row of example {self.ids[place]} is not the sketch of its "
                f"gradient at the model's weights, but off by {distance:.3g} of its "
                "norm. Pass the checkpoint that the rows were sketched at, or sketch "
                "them with sketch_dataset."
            )


def _usable(norms: Tensor) -> Tensor:
    """Return the norms of queries' gradients, unless one says nothing.

    Raises:
        ValueError: a gradient is zero or not finite.
    """
    unusable = (~norms.isfinite() | (norms == 0)).nonzero().squeeze(1).tolist()
    if unusable:
        raise ValueError(
            "Each query needs a finite gradient that is not zero, got others for the "
            f"queries {unusable}. Leave them out, and check that their labels are not "
            "all -100."
        )
    return norms


def _student(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t, by its expansion in 1 / degrees."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
