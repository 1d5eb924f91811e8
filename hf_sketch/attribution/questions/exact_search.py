"""A search for the greatest exact scores, by bounds that sketches give."""

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.columns import EXAMPLE, column
from hf_sketch.attribution.methods import Cosine
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.exact_products import ExactGradients, HeldGradients
from hf_sketch.attribution.scores import QueryMatrix, best_places, dense_scores
from hf_sketch.attribution.shares import RowShare
from hf_sketch.sketches import CounterRandom
from hf_sketch.store.blocks import sketch_matrix

_OFF = 0.1  # relative distance of a row from its gradient's sketch, int8 included


@dataclass(eq=False)
class ExactSearch:
    """Exact scores of some rows, and bounds on those of the others.

    Scores are divided by the query's norm. By sketch they are known as `cosines` times
    `scale`. The variance of a cosine c grows like 1 + c^2, as with a Gaussian matrix.

    Shapes:
        cosines, scores (queries, rows); ids, lengths, scale, known (rows,); norms
        (queries,)
    """

    rows: SketchedRows
    gradients: ExactGradients
    dataset: Any
    held: HeldGradients
    norms: Tensor
    cosines: Tensor
    lengths: Tensor
    ids: np.ndarray[Any, Any]
    method: str
    scale: Tensor = field(init=False)
    scores: Tensor = field(init=False)
    known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        dot = self.method == "dot"
        self.scale = self.lengths if dot else torch.ones_like(self.lengths)
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
    ) -> "ExactSearch":
        """Sketch the queries, and hold their exact gradients."""
        ids = column(rows.dataset, EXAMPLE)
        if len(np.unique(ids)) < len(ids) or not column(rows.dataset, "finite").all():
            raise ValueError(
                "Exact scores need one finite row per example, got "
                f"{len(ids)} rows of {len(np.unique(ids))} examples. Keep those of one "
                "state of the model with where(step=..., finite=True)."
            )
        lengths = torch.from_numpy(column(rows.dataset, "gradient_norm")).double()
        if not lengths.any() or not len(queries):
            raise ValueError(
                "Exact scores need queries, and rows other than zero, got "
                f"{len(queries)} queries and {int(lengths.count_nonzero())} rows other "
                "than zero. Check that the examples have labels."
            )
        exact = [gradients.of(query) for query in queries]
        sketches = torch.stack([rows.model_sketch.sketch(x) for x in exact]).cpu()
        matrix = QueryMatrix((sketches.float(),))
        cosines = dense_scores(RowShare(rows.dataset), matrix, Cosine()).double()
        held = gradients.held(exact)
        norms = _usable(held.norms())
        return cls(rows, gradients, dataset, held, norms, cosines, lengths, ids, method)

    def sample(self, size: int, seed: int) -> Tensor:
        """Draw rows to measure the error on. Those of zero have none.

        Shapes:
            returns (at most size,)
        """
        order = CounterRandom(seed, "certified").permutation(len(self.ids))
        return order[self.lengths[order] > 0][:size]

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
    """Return the norms of queries' gradients, if all of them can be compared.

    Raises:
        ValueError: a gradient is zero or not finite.
    """
    unusable = (~norms.isfinite() | (norms == 0)).nonzero().squeeze(1).tolist()
    if unusable:
        raise ValueError(
            f"The gradients of the queries {unusable} are zero or not finite. Leave "
            "these queries out, or check that their labels are not all -100."
        )
    return norms
