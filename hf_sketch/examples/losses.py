"""Each example's own loss, out of the logits of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.calls import (
    IGNORED,
    ModelCall,
    loss_of,
    next_labels,
    penalty_of,
)
from hf_sketch.examples.rounding import agree
from hf_sketch.examples.rules.base import answers_of
from hf_sketch.examples.rules.nearest_loss import (
    CERTAIN,
    allowed_distance,
    distance,
    nearest,
    read_together,
)
from hf_sketch.examples.rules.token_losses import span_losses, token_losses
from hf_sketch.examples.split import ExampleSplit, Rows

REDUCTIONS = ("mean", "sum")
_CAUSAL = ("CausalLM", "LMHead")
_SPAN = ("start_positions", "end_positions")


class UnknownLossError(ValueError):
    """A batch's loss is no sum over its examples that is known."""


@dataclass(frozen=True)
class ExampleLosses:
    """A batch's loss as a weighted sum of its examples' own losses.

    Args:
        losses: (b,), each example's own loss, whatever its batch-mates.
        weights: (b,), with sum(weights * losses) = the batch's loss.
        known: (), whether it is so, where only the device knows; None if it is.
    """

    losses: Tensor
    weights: Tensor
    known: Tensor | None = None


def example_losses(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None = None,
    *,
    reduction: str = "mean",
    items_in_batch: Tensor | int | None = None,
    causal: bool = False,
    split: ExampleSplit | None = None,
) -> ExampleLosses:
    """Split a batch's loss into its examples' own losses.

    Covers cross-entropy over the tokens of language models (causal, masked, sequence to
    sequence) and token classifiers, and over the classes of sequence and image
    classifiers; squared error (`problem_type="regression"` or one output) and binary
    cross-entropy over several labels: as the models of Transformers compute them,
    averaged over all tokens or examples of the batch, or divided by `items_in_batch`.

    Shapes:
        loss (), logits (b, classes) or (b, t, classes), labels (b,), (b, classes) or
        (b, t), with -100 where no loss is taken

    Args:
        loss: loss of the batch.
        logits: the model's.
        labels: as the model got them.
        problem_type: problem type of the model's configuration.
        reduction: "mean" or "sum" over the tokens of an example.
        items_in_batch: the Trainer's `num_items_in_batch`, if the model got it.
        causal: tie-breaker for a loss that both shifted and unshifted labels
            reproduce, as may happen before training.
        split: the batch's examples, by default its rows.

    Raises:
        ValueError: the loss is no such sum over the examples, or `reduction` is
            unknown.
    """
    check_reduction(reduction)
    split = split or Rows(len(labels))
    found: list[tuple[float, float, ExampleLosses]] = []
    rules = token_losses(logits.detach(), labels, problem_type, causal)
    for summed, reduced in _candidates(rules, split, reduction, items_in_batch):
        got, total = read_together(loss, summed)
        found.append((distance(got, total, loss.dtype), total, reduced))
        if found[-1][0] <= CERTAIN:
            return reduced
    if not found:
        raise UnknownLossError(
            "per-example gradients need logits (batch, classes) with one label a row, "
            "or (batch, tokens, classes) with one a token, got logits "
            f"{tuple(logits.shape)} and labels {tuple(labels.shape)}: pass "
            "per_example=False."
        )
    far, _, reduced = min(found, key=lambda candidate: candidate[0])
    if far > 1 and far > allowed_distance(logits):
        totals = sorted({f"{total:.6g}" for _, total, _ in found})
        raise UnknownLossError(
            "per-example gradients need a loss that is a mean of the examples' own "
            f"losses, here {' or '.join(totals)}, got {float(loss):.6g}: train with the"
            " model's own loss, or pass per_example=False."
        )
    return reduced


def unread_losses(
    model: nn.Module,
    loss: Tensor,
    output: Any,
    inputs: Mapping[str, Any],
    split: ExampleSplit,
    reduction: str,
) -> ExampleLosses | None:
    """Split the loss as `own_losses_of` does; the device alone knows if that is right.

    None if the shapes of labels and scores fit no rule.
    """
    labels = inputs.get("labels")
    scores = [x for x in answers_of(output) if split.within(x) is not None]
    if not isinstance(labels, Tensor) or len(scores) != 1:
        return None
    logits = scores[0].detach()
    rules = token_losses(logits, labels, _problem_type(model), is_causal(model))
    items = inputs.get("num_items_in_batch")
    try:
        candidates = [*_candidates(rules, split, reduction, items)]
    except UnknownLossError:
        return None
    if not candidates:
        return None
    totals, parts = zip(*candidates, strict=True)
    place, known = nearest(loss.detach(), totals, logits)
    losses = torch.stack([of.losses for of in parts]).index_select(0, place)
    weights = torch.stack([of.weights for of in parts]).index_select(0, place)
    return ExampleLosses(losses[0], weights[0], known)


def own_losses_of(
    model: nn.Module,
    loss: Tensor,
    output: Any,
    inputs: Mapping[str, Any],
    split: ExampleSplit,
    reduction: str,
    penalised: bool = False,
) -> ExampleLosses | None:
    """Split the loss in a model's output; None if its form is not known.

    Args:
        model: the model.
        loss: loss of the batch.
        output: the model's.
        inputs: what it was called with, by name.
        split: the batch's examples.
        reduction: "mean" or "sum" over the tokens of an example.
        penalised: the loss has a penalty on weights. Its gradient by the scores, then,
            shows what the rest is.
    """
    labels = inputs.get("labels")
    scores = [x for x in answers_of(output) if split.within(x) is not None]
    if not penalised and [*map(len, scores)] == [split.size] * len(_SPAN):
        places = [inputs.get(name) for name in _SPAN]
        return _of_spans(loss.detach(), scores, places, split, reduction)
    if not isinstance(labels, Tensor) or len(scores) != 1:
        return None
    problem = _problem_type(model)
    items, causal = inputs.get("num_items_in_batch"), is_causal(model)
    try:
        if not penalised:
            return example_losses(
                loss.detach(),
                scores[0],
                labels,
                problem,
                reduction=reduction,
                items_in_batch=items,
                causal=causal,
                split=split,
            )
        logits = scores[0].detach().requires_grad_()
        (wanted,) = torch.autograd.grad(loss, scores[0], retain_graph=True)
        rules = token_losses(logits, labels, problem, causal)
        for total, reduced in _candidates(rules, split, reduction, items):
            (got,) = torch.autograd.grad(total, logits, retain_graph=True)
            if agree(got, wanted, "rule"):
                return reduced
    except UnknownLossError:
        pass
    return None


def knows_loss(model: nn.Module, output: Any, call: ModelCall) -> bool:
    """Return whether the loss in a model's output is of a known form, or not there."""
    loss = loss_of(output)
    if loss is None or not loss.requires_grad:
        return True
    penalty = penalty_of(model, output)
    parts = (loss,) if penalty is None else (loss, loss - penalty)
    given = output, call.inputs, call.split, "mean"
    return any(own_losses_of(model, part, *given) is not None for part in parts)


def _of_spans(
    loss: Tensor,
    scores: Sequence[Tensor],
    places: Sequence[Any],
    split: ExampleSplit,
    reduction: str,
) -> ExampleLosses | None:
    """Split the loss of a model that finds spans; None if it is another."""
    rules = span_losses([x.detach() for x in scores], places)
    for total, reduced in _candidates(rules, split, reduction, None):
        got, expected = read_together(loss, total)
        allowed = max(1.0, allowed_distance(scores[0]))
        if distance(got, expected, loss.dtype) <= allowed:
            return reduced
    return None


def token_counts(
    model: nn.Module, inputs: Mapping[str, Any], split: ExampleSplit
) -> Tensor | None:
    """Return the number of each example's tokens that a causal model predicts, (b,).

    None for a model that is not causal, or gets no labels of tokens.
    """
    labels = next_labels(inputs) if is_causal(model) else None
    if labels is None or split.within(labels) is None:
        return None
    return per_example(labels != IGNORED, split)


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token, as far as names of classes tell."""
    classes = [kind.__name__ for kind in type(model).__mro__]
    return any(name in kind for kind in classes for name in _CAUSAL)


def _problem_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "problem_type", None)


def check_reduction(reduction: str) -> None:
    """Raise unless `reduction` is the name of one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"loss must be one of {REDUCTIONS}, got {reduction!r}.")


def _candidates(
    rules: Iterator[tuple[Tensor, Tensor]],
    split: ExampleSplit,
    reduction: str,
    items_in_batch: Tensor | int | None,
) -> Iterator[tuple[Tensor, ExampleLosses]]:
    """Yield each loss that a batch may have, with what its examples' own are then."""
    for losses, counted in rules:
        sums, counts = (per_example(x, split) for x in (losses, counted))
        for items in (items_in_batch, counts.sum()):
            if items is not None:
                own = reduced_losses(
                    sums.detach(), counts, torch.as_tensor(items), reduction
                )
                yield sums.sum() / items, own


def reduced_losses(
    sums: Tensor, counts: Tensor, items: Tensor, reduction: str
) -> ExampleLosses:
    """Own losses and weights, given each example's sum and number of tokens."""
    items = items.clamp(min=1)  # of labels that are all ignored there are none
    if reduction == "sum":
        return ExampleLosses(sums, (counts > 0).to(sums) / items.to(sums))
    return ExampleLosses(sums / counts.clamp(min=1), counts / items.to(counts))


def per_example(x: Tensor, split: ExampleSplit) -> Tensor:
    """The sum over each example's tokens: (b,)."""
    rows = split.rows(x)
    if rows is None:
        raise UnknownLossError(
            f"labels {tuple(x.shape)} do not divide into {split.size} examples: pass "
            "per_example=False."
        )
    return rows.flatten(1).sum(1) if rows.dim() > 1 else rows
