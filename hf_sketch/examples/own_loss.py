"""The part of a batch's loss that its examples own, and what is left."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import ModelCall, loss_of
from hf_sketch.examples.losses import ExampleLosses, own_losses_of, penalty_of
from hf_sketch.examples.modules.reading import Reading
from hf_sketch.examples.rules.base import answers_of
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
    model = reading.model
    penalty = penalty_of(model, output)
    rest = () if penalty is None else (loss - penalty,)
    for own in (loss, *rest):
        batch.losses = own_losses_of(
            model, own, output, batch.inputs, batch.split, reduction
        )
        if batch.losses is not None:
            return rest[0] if rest else loss
    form, size = reading.loss_form(call), call.split.size
    batch.penalised = form == "penalty"
    if batch.penalised:
        batch.losses = own_losses_of(
            model, loss, output, batch.inputs, batch.split, reduction, penalised=True
        )
    elif form != "shares":
        weight = 1.0 if form == "sum" else 1 / size
        dtype = accumulation_dtype(loss.dtype)
        weights = loss.new_full((size,), weight, dtype=dtype)
        batch.losses = ExampleLosses(weights * torch.nan, weights)
    return loss


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
    loss: Tensor, ends: Collection[Any], parameters: Iterable[Tensor]
) -> bool:
    """Return whether a loss is that of a model's outputs plus a term of parameters.

    Where outputs and parameters are multiplied, as by a head outside the model, the
    parameters' gradients belong to examples.

    Args:
        loss: what is differentiated.
        ends: the nodes of autograd at which the model's outputs were made.
        parameters: of the model.
    """
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
