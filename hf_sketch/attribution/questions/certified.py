"""The rows with the greatest exact scores, found by way of their sketches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.questions.exact_products import ExactGradients
from hf_sketch.attribution.questions.exact_search import ExactSearch
from hf_sketch.attribution.sketching import collate_for
from hf_sketch.examples.sketcher import ExampleLossFunction
from hf_sketch.model.state import evaluation_mode
from hf_sketch.sketches.choices import check_choice, check_count, check_setting

METHODS = ("dot", "cosine")
_LEAST_SAMPLE = 16


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
        search = ExactSearch.of(self, gradients, dataset, queries, method)
        count = len(search.ids)
        order = search.sample(sample, seed)
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


def _student(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t, by its expansion in 1 / degrees."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
