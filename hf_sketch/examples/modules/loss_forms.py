"""How a loss of unknown form adds up over examples."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hf_sketch.examples.attempt import RefusalError
from hf_sketch.examples.calls import ModelCall, loss_of
from hf_sketch.examples.losses import token_counts
from hf_sketch.examples.modules.passes import Passes, answers_in
from hf_sketch.examples.rounding import tolerance
from hf_sketch.model.sketch import ModelSketch

LossForm = Literal["tokens", "mean", "sum", "shares", "penalty"]
EXAMPLES = 2
_ITEMS = "num_items_in_batch"


def loss_form(
    passes: Passes, call: ModelCall, model_sketch: ModelSketch, dtype: torch.dtype
) -> LossForm:
    """Return how the loss that a model computes adds up over examples.

    Returns:
        "tokens" for the mean over the tokens that a causal model predicts; "mean" or
        "sum" of the examples' own; "penalty" where a penalty on weights comes
        on top of what the model's scores give; "shares" for all others, and where the
        examples have equally many tokens, so that "tokens" and "mean" look the same.

    Raises:
        RefusalError: it is no weighted sum of the examples' own losses.
    """
    call = _few(passes, call)
    counts = token_counts(passes.model, call.inputs, call.split)
    over_items = _is_over_items(passes, call, counts, model_sketch, dtype)
    if call.split.size == 1:
        return "tokens" if over_items else "shares"
    if _has_penalty(passes, call, model_sketch, dtype):
        return "penalty"
    plain = call.without(_ITEMS)
    try:
        weights = loss_weights(passes, call, model_sketch, dtype)
    except RefusalError:  # one of several terms may be divided by the tokens of a batch
        loss_weights(passes, plain, model_sketch, dtype)
        return "shares"
    if over_items:
        return "tokens"
    forms: dict[LossForm, Tensor] = {
        "mean": torch.full_like(weights, 1 / EXAMPLES),
        "sum": torch.ones_like(weights),
    }
    if counts is not None and over_items is None:
        own = weights
        if _ITEMS in call.kwargs:
            own = loss_weights(passes, plain, model_sketch, dtype)
        form = _nearest(own, {**forms, "tokens": counts / counts.sum()}, dtype)
        if form in ("tokens", "shares"):
            return form
    return _nearest(weights, forms, dtype)


def _few(passes: Passes, call: ModelCall) -> ModelCall:
    """Return the call with two examples, with unequal numbers of tokens if possible."""
    counts, first = token_counts(passes.model, call.inputs, call.split), 0
    if counts is not None and call.split.size > EXAMPLES:
        first = int((counts[1:] != counts[:-1]).int().argmax())
    return call.part(first, min(EXAMPLES, call.split.size))


def _nearest(
    weights: Tensor, forms: Mapping[LossForm, Tensor], dtype: torch.dtype
) -> LossForm:
    """Return the form that has these weights; "shares" if none has, or several."""
    distances: dict[LossForm, float] = {
        form: _distance(weights, of) for form, of in forms.items()
    }
    nearest = min(distances, key=lambda form: distances[form])
    apart = [
        _distance(forms[nearest], of) for form, of in forms.items() if form != nearest
    ]
    near = min(10 * tolerance(dtype, "row"), *(x / 2 for x in apart))
    return nearest if distances[nearest] < near else "shares"


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b.to(a)).abs().max())


def _is_over_items(
    passes: Passes,
    call: ModelCall,
    counts: Tensor | None,
    model_sketch: ModelSketch,
    dtype: torch.dtype,
) -> bool | None:
    """Return whether the number of the step's tokens divides the sum over tokens.

    None if the Trainer passes no such number, or it is the number of these tokens.
    """
    items = call.kwargs.get(_ITEMS)
    if items is None or counts is None:
        return None
    # Numbers of Python, since sketches are on the CPU and counts on any device.
    items, total, plain = int(items), int(counts.sum()), call.without(_ITEMS)
    of_sum = total * passes.loss_sketch(plain, model_sketch)
    found = items * passes.loss_sketch(call, model_sketch)
    distance = torch.linalg.vector_norm(found - of_sum)
    if not distance <= tolerance(dtype, "row") * torch.linalg.vector_norm(of_sum):
        return False
    return True if call.split.size == 1 or items != total else None


def _has_penalty(
    passes: Passes, call: ModelCall, model_sketch: ModelSketch, dtype: torch.dtype
) -> bool:
    """Return whether the loss has a gradient past the scores, equal for all batches."""
    if passes.graphs_serve_once:
        return False
    past: list[Tensor] = []
    norm = 0.0
    for some in (call, *(call.part(i, 1) for i in range(EXAMPLES))):
        output = passes.forward(some)
        loss, scores = loss_of(output), answers_in(output, some.split)
        if loss is None or len(scores) != 1 or not scores[0].dim():
            return False
        (by_scores,) = torch.autograd.grad(
            loss, scores, retain_graph=True, materialize_grads=True
        )
        whole = passes.sketch([loss], model_sketch)
        past.append(whole - passes.sketch(scores, model_sketch, [by_scores]))
        norm = max(norm, float(torch.linalg.vector_norm(whole)))
    least = tolerance(dtype, "row") * norm
    apart = [float(torch.linalg.vector_norm(x - past[0])) for x in past]
    return max(apart) <= least < float(torch.linalg.vector_norm(past[0]))


def loss_weights(
    passes: Passes, call: ModelCall, model_sketch: ModelSketch, dtype: torch.dtype
) -> Tensor:
    """Return the weights with which examples' own losses add up to their batch's.

    The gradient of the batch's loss is compared with those of the examples alone.
    """
    together = passes.loss_sketch(call, model_sketch)
    parts = [call.part(index, 1) for index in range(call.split.size)]
    each = [passes.loss_sketch(part, model_sketch) for part in parts]
    alone = torch.stack(each, dim=1)
    weights = torch.linalg.lstsq(alone, together.unsqueeze(1)).solution.squeeze(1)
    rest = torch.linalg.vector_norm(together - alone @ weights)
    if rest > tolerance(dtype, "row") * torch.linalg.vector_norm(together):
        raise RefusalError(
            "per-example gradients need a loss that is a weighted sum of the examples' "
            f"own losses, but {type(passes.model).__name__} computes one that compares "
            "them, or has a term of the whole batch: leave that out, or pass "
            "per_example=False."
        )
    return weights
