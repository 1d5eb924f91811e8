"""Which tokens of a training example taught which tokens of a query."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from hf_sketch.attribution.columns import EXAMPLE, matching_rows
from hf_sketch.attribution.methods import Method
from hf_sketch.attribution.queries import SketchedRows
from hf_sketch.attribution.scores import QueryMatrix, dense_scores
from hf_sketch.attribution.shares import RowShare
from hf_sketch.attribution.sketching import collate_for
from hf_sketch.examples.calls import IGNORED
from hf_sketch.examples.losses import check_reduction, is_causal
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.groups import Layers
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import evaluation_mode
from hf_sketch.store.blocks import sketch_matrix

_OFF = 0.1  # relative distance of a row from its tokens' sum, int8 included


class ScorableRows(SketchedRows, Protocol):
    """Rows whose methods of scoring have names."""

    def scored_by(self, method: str | Method, layers: Layers | None = None) -> Method:
        """The method of a name, see `GradientRows.scored_by`."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """The score of a row for a query, divided among the tokens of both.

    A token stands for the loss that the model has where it is the label: in a causal
    model, the loss of predicting it.

    Shapes:
        scores (tokens of the example, tokens of the query), float64

    Args:
        scores: positive where training on the example's token lowered the loss of the
            query's token. They add up to `stored`.
        example_places: places of the example's tokens among its labels.
        query_places: the same for the query.
        stored: score of the store's own row.
    """

    scores: Tensor
    example_places: list[int]
    query_places: list[int]
    stored: float

    def __repr__(self) -> str:
        rows, columns = self.scores.shape
        return (
            f"A score of {self.stored:.4g}, divided among {rows} tokens of the example "
            f"and {columns} of the query"
        )


def token_scores(
    self: ScorableRows,
    model: nn.Module,
    dataset: Any,
    example_id: int,
    query: Mapping[str, Any],
    method: str | Method = "preconditioned",
    *,
    row_model: nn.Module | None = None,
    layers: Layers | None = None,
    loss: str = "mean",
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    processing_class: Any = None,
) -> TokenScores:
    """Divide a row's score for a query among the tokens of both.

    A gradient is the sum of its tokens' gradients, and a score is linear in both
    gradients, so that it is a sum over pairs of tokens. The model runs once for each
    token of the example and of the query.

    Args:
        self: the store, with one row of the example: choose it by `where(step=...)`.
        model: the model at the query's weights.
        dataset: the examples of the rows, by example id, as for `sketch_dataset`.
        example_id: the example.
        query: an example to ask of, as for `sketch_dataset`.
        method: see `GradientRows.attribute`, but for "cosine".
        row_model: the model at the weights that the row was recorded at, as a
            checkpoint keeps them; by default `model`.
        layers: groups of layers, as in `GradientRows.attribute`.
        loss: what the row is the gradient of: the "mean" or the "sum" over tokens.
        batch_size: tokens per pass.
        data_collator: see `sketch_dataset`.
        processing_class: see `sketch_dataset`.

    Returns:
        the matrix, and which tokens its rows and columns belong to.

    Raises:
        ValueError: the store has no row or several rows of the example; the labels are
            not those of tokens; the tokens' gradients do not add up to the row, which
            was recorded at other weights; or the method is "cosine".

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_sketch import ModelSketch, sketch_dataset
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
        >>> model = GPT2LMHeadModel(config)
        >>> ids = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 4]]
        >>> data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        >>> rows = sketch_dataset(model, data, ModelSketch.from_model(model, 256))
        >>> found = rows.token_scores(model, data, 0, data[1], "dot")
        >>> found.scores.shape, found.example_places
        (torch.Size([3, 3]), [1, 2, 3])
        >>> abs(float(found.scores.sum()) / found.stored - 1) < 1e-5
        True
    """
    check_reduction(loss)
    chosen = self.scored_by(method, layers)
    if chosen.averaged:
        raise ValueError(
            "A cosine is not a sum over tokens. Pass another method, such as 'dot'."
        )
    row = matching_rows(self.dataset, {EXAMPLE: example_id})
    if len(row) > 1:
        raise ValueError(
            f"The store has {len(row)} rows of example {example_id}. Choose one, such "
            "as store.where(step=...), and pass the checkpoint of that step."
        )
    collate = collate_for(model, data_collator, processing_class)
    rows_of = partial(_token_rows, self.model_sketch, collate, loss, batch_size)
    example_places, example = rows_of(row_model or model, dataset[int(example_id)])
    query_places, asked = rows_of(model, query)
    _check_sum(row, example, example_id)
    (block,) = RowShare(row).blocks(chosen)
    weights = chosen.weights(block)
    weight = 1.0 if weights is None else float(weights)
    scores = weight * example.double() @ chosen.transform(asked).double().T
    whole = QueryMatrix((asked.sum(0, keepdim=True),))
    stored = float(dense_scores(RowShare(row), whole, chosen))
    return TokenScores(scores, example_places, query_places, stored)


def _token_rows(
    sketch: ModelSketch,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    loss: str,
    batch_size: int,
    model: nn.Module,
    example: Mapping[str, Any],
) -> tuple[list[int], Tensor]:
    """Return the places of an example's labels, and each one's part of its row.

    Shapes:
        returns (tokens, row_size), float32, on the CPU
    """
    inputs = send_to_device(
        dict(collate([example])), next(iter(model.parameters())).device
    )
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "Scores of tokens need labels of tokens, (1, tokens), got "
            f"{getattr(labels, 'shape', None)}. Pass an example of a language model, or"
            " a collator that adds its labels."
        )
    places = (labels[0] != IGNORED).nonzero().squeeze(1)
    if is_causal(model):
        places = places[places > 0]  # nothing predicts the first
    parts: list[Tensor] = []
    with evaluation_mode(model), ExampleSketcher(model, sketch) as sketcher:
        for some in places.split(batch_size):
            count = len(some)
            batch = {
                name: x.repeat(count, *[1] * (x.dim() - 1))
                if isinstance(x, Tensor) and x.dim() and len(x) == 1
                else x
                for name, x in inputs.items()
            }
            own = torch.full_like(batch["labels"], IGNORED)
            own[torch.arange(count), some] = labels[0, some]
            parts.append(sketcher.sketch({**batch, "labels": own}).rows.float().cpu())
    rows = torch.cat([torch.empty(0, sketch.row_size), *parts])
    return places.tolist(), rows / max(1, len(rows)) if loss == "mean" else rows


def _check_sum(row: Dataset, parts: Tensor, example_id: int) -> None:
    """Raise unless a row is the sum of its tokens' parts."""
    stored = sketch_matrix(row).squeeze(0)
    distance = float((stored - parts.sum(0)).norm() / stored.norm().clamp(min=1e-30))
    if not distance <= _OFF:
        raise ValueError(
            f"The tokens of example {example_id} do not add up to its row, but are off "
            f"by {distance:.3g} of its norm. Pass the checkpoint that the row was "
            "recorded at as row_model, and the loss that rows are gradients of."
        )
