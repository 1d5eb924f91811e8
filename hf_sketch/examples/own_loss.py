"""The part of a batch's loss that its examples own, and what is left."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.attempt import RefusalError
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import (
    IGNORED,
    ModelCall,
    loss_of,
    next_labels,
    penalty_of,
)
from hf_sketch.examples.losses import (
    ExampleLosses,
    own_losses_of,
    per_example,
    reduced_losses,
    token_counts,
    unread_losses,
)
from hf_sketch.examples.modules.loss_forms import LossForm
from hf_sketch.examples.modules.reading import Reading
from hf_sketch.examples.rounding import tolerance
from hf_sketch.examples.rules.base import answers_of
from hf_sketch.model.gradient_hooks import unhooked
from hf_sketch.sketches.operator import accumulation_dtype


def split_loss(
    reading: Reading, batch: Batch, call: ModelCall, output: Any, reduction: str
) -> Tensor | None:
    """Find the examples' own losses; return the part of the loss that they are.

    A penalty on weights comes through no module's output, so that it need not be taken
    out of the loss to be left out of the rows.
    """
    loss = loss_of(output)
    if loss is None or not loss.requires_grad:
        return None
    model, known = reading.model, reading.known_losses
    given = output, batch.inputs, batch.split, reduction
    penalty = penalty_of(model, output)
    # Leaving it out takes a second backward pass, which graphs in shards do not allow.
    if penalty is not None and reading.in_shards:
        raise RefusalError(
            "Rows of examples do not support the balancing loss of a model's routers "
            "when its parameters are sharded. Set model.config.output_router_logits = "
            "False, train without FSDP and ZeRO-3, or pass per_example=False."
        )
    rest = () if penalty is None else (loss - penalty,)
    if not rest and known.has(call, loss):
        batch.losses = unread_losses(model, loss, *given)
    if batch.is_known is not None:
        known.check_later(call, batch.is_known)
        return loss
    for own in (loss, *rest):
        batch.losses = own_losses_of(model, own, *given)
        if batch.losses is not None:
            known.add(call)
            return rest[0] if rest else loss
    form = reading.loss_form(call)
    batch.penalised = form == "penalty"
    if batch.penalised:
        batch.losses = own_losses_of(model, loss, *given, penalised=True)
    else:
        batch.losses = _of_form(form, reading.model, batch, loss, reduction)
    return loss


def _of_form(
    form: LossForm, model: nn.Module, batch: Batch, loss: Tensor, reduction: str
) -> ExampleLosses | None:
    """Return the weights of losses that are unknown; None for shares of the loss."""
    size = batch.split.size
    if form == "tokens":
        counts = token_counts(model, batch.inputs, batch.split)
        assert counts is not None
        items = batch.inputs.get("num_items_in_batch")
        items = torch.as_tensor(counts.sum() if items is None else items)
        counts = counts.to(accumulation_dtype(loss.dtype))
        unknown = torch.full_like(counts, torch.nan)
        return reduced_losses(unknown, counts, items, reduction)
    if form in ("mean", "sum"):
        weight = 1.0 if form == "sum" else 1 / size
        dtype = accumulation_dtype(loss.dtype)
        weights = loss.new_full((size,), weight, dtype=dtype)
        return ExampleLosses(weights * torch.nan, weights)
    return None


class TokenMeans:
    """Losses that others compute as the mean of a model's `log_probs` over tokens.

    TRL's SFTTrainer does. The first loss of a single call shows whether it is such a
    mean. If so, each example's own loss is known, and its weight is what the gradients
    of its tokens' log-probabilities add up to.
    """

    def __init__(self) -> None:
        self._found: bool | None = None

    def keep(self, batch: Batch, output: Any, reduction: str) -> None:
        """Keep a call's log-probabilities until its loss is there, or watch them."""
        found = _log_probs_of(batch, output)
        if found is None or self._found is False:
            return
        batch.log_probs = found
        if self._found:
            _watch_tokens(batch, *found, reduction)

    def note(
        self,
        calls: Sequence[Batch],
        loss: Tensor,
        items: Tensor | int | None,
        reduction: str,
    ) -> None:
        """Find out what the first loss is, before its backward pass.

        Args:
            calls: calls of the model, that the loss is made of.
            loss: what is differentiated.
            items: number of tokens that it may be divided by.
            reduction: "mean" or "sum" over an example's tokens.
        """
        found = calls[0].log_probs if len(calls) == 1 else None
        if self._found is not None or found is None or not loss.requires_grad:
            return
        log_probs, counted = found
        if bool(counted.any()):
            with unhooked([loss, log_probs, *calls[0].numbers]):
                self._found = _is_mean(loss, log_probs, counted, items)
            if self._found:
                _watch_tokens(calls[0], log_probs, counted, reduction)


def _log_probs_of(batch: Batch, output: Any) -> tuple[Tensor, Tensor] | None:
    """Return a model's log-probabilities of labels, and where a label counts."""
    if not isinstance(output, Mapping):
        return None
    fields: Mapping[str, Any] = output
    log_probs, counted = fields.get("log_probs"), fields.get("label_mask")
    if not isinstance(log_probs, Tensor) or not log_probs.requires_grad:
        return None
    if not isinstance(counted, Tensor):
        labels = next_labels(batch.inputs)
        counted = torch.tensor(False) if labels is None else labels != IGNORED
    if counted.shape != log_probs.shape or batch.split.within(log_probs) is None:
        return None
    return log_probs, counted


def _is_mean(
    loss: Tensor, log_probs: Tensor, counted: Tensor, items: Tensor | int | None
) -> bool:
    """Return whether a loss is minus the mean of log-probabilities over tokens.

    Each has the same coefficient, then: one over their number in the batch or in the
    step, times the number of processes that share them.
    """
    (gradient,) = torch.autograd.grad(
        loss, log_probs, retain_graph=True, materialize_grads=True
    )
    # On the CPU, since not every device has float64.
    own, values, whole = (
        x.detach().to("cpu", torch.float64)
        for x in (gradient[counted], log_probs[counted], loss)
    )
    even, near = own.mean(), tolerance(loss.dtype, "loss")
    total = (own * values).sum()
    shares = [-even * len(own)]
    if items is not None:
        share = -even * torch.as_tensor(items).cpu()
        shares.append(share / share.round().clamp(min=1))
    return (
        bool((own - even).abs().max() <= near * even.abs())
        and bool((whole - total).abs() <= near * total.abs())
        and any(bool((share - 1).abs() <= near) for share in shares)
    )


def _watch_tokens(
    batch: Batch, log_probs: Tensor, counted: Tensor, reduction: str
) -> None:
    """Set the examples' own losses, and watch the weights that they get."""
    dtype = accumulation_dtype(log_probs.dtype)
    counts = per_example(counted, batch.split).to(dtype)
    sums = per_example(-log_probs.detach().to(dtype), batch.split)
    batch.losses = reduced_losses(sums, counts, torch.ones_like(counts), reduction)

    def read(gradient: Tensor) -> None:
        total = per_example(-gradient.where(counted, 0).to(dtype), batch.split)
        batch.scale = total / counts.clamp(min=1)

    batch.watch(log_probs, read)


def own_part(model: nn.Module, output: Any, penalised: bool) -> Tensor:
    """Return what has the gradient of a loss without its penalty."""
    loss = loss_of(output)
    assert loss is not None
    if penalised:
        (scores,) = answers_of(output)
        (gradient,) = torch.autograd.grad(loss, scores, retain_graph=True)
        return (scores * gradient).sum()
    penalty = penalty_of(model, output)
    return loss if penalty is None else loss - penalty


def adds_penalty(
    loss: Tensor, calls: Iterable[Batch], parameters: Iterable[Tensor]
) -> bool:
    """Return whether a loss is that of a model's outputs plus a term of parameters.

    Where outputs and parameters are multiplied, as by a head outside the model, the
    parameters' gradients belong to examples.

    Args:
        loss: what is differentiated.
        calls: calls of the model, whose outputs these are.
        parameters: parameters of the model.
    """
    ends = {end for call in calls for end in call.ends}
    wanted = {id(parameter) for parameter in parameters}
    # Of each node: whether outputs, parameters and a product of both lie before it.
    found: dict[Any, tuple[bool, bool, bool]] = {}
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left[-1]
        before = [some for some, _ in node.next_functions if some is not None]
        if node in ends:
            found[node] = True, False, False
        elif unknown := [some for some in before if some not in found]:
            left += unknown
            continue
        else:
            held = id(getattr(node, "variable", None)) in wanted
            found[node] = _joined(node.name(), held, [found[some] for some in before])
        left.pop()
    return found[loss.grad_fn] == (True, True, False)


def _joined(
    name: str, held: bool, before: Collection[tuple[bool, bool, bool]]
) -> tuple[bool, bool, bool]:
    """Return what lies before a node, given what lies before those before it."""
    outputs = any(found[0] for found in before)
    parameters = held or any(found[1] for found in before)
    mixed = any(found[2] for found in before)
    if not name.startswith(("Add", "Sub")) and len(before) > 1:
        mixed = mixed or (outputs and parameters)
    return outputs, parameters, mixed
