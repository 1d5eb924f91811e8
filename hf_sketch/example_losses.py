"""Each example's own loss, out of the logits of a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_IGNORED = -100
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ExampleLosses:
    """A batch's loss as a weighted sum of its examples' own losses.

    Args:
        losses: (b,), each example's own loss, whatever its batch-mates.
        weights: (b,), with sum(weights * losses) = the batch's loss.
    """

    losses: Tensor
    weights: Tensor


def example_losses(
    loss: Tensor, logits: Tensor, labels: Tensor, problem_type: str | None = None
) -> ExampleLosses:
    """Split a sequence classification loss into its examples' own losses.

    Covers cross-entropy over classes, squared error (`problem_type="regression"` or one
    output), and binary cross-entropy over several labels, each averaged over the batch,
    as the sequence classification models of Transformers do.

    Shapes:
        loss (), logits (b, classes), labels (b,) or (b, classes)

    Raises:
        ValueError: the loss is not the average of such losses over the examples.
    """
    own_losses = _loss_kind(logits, labels, problem_type)
    if own_losses is None:
        raise ValueError(
            "per-example gradients need sequence classification logits (batch, classes)"
            f" and one label a row, got logits {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}: pass per_example=False."
        )
    losses = own_losses(logits.detach(), labels)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    counted = torch.ones_like(losses)
    if not labels.is_floating_point():
        counted = (labels != _IGNORED).to(losses)
    weights = counted / counted.sum()
    _check_additive(loss.detach(), (losses * weights).sum())
    return ExampleLosses(losses, weights)


def _loss_kind(
    logits: Tensor, labels: Tensor, problem_type: str | None
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The function that gives each example's own loss, or None."""
    if logits.dim() != 2 or labels.shape[0] != logits.shape[0]:
        return None
    if not labels.is_floating_point() and problem_type != "regression":
        return _cross_entropy if labels.numel() == len(labels) else None
    if labels.numel() != logits.numel():
        return None
    if problem_type == "regression" or logits.shape[1] == 1:
        return _squared_error
    return _binary_cross_entropy


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits, labels.view(-1), ignore_index=_IGNORED, reduction="none"
    )


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels.view_as(logits)).square().mean(1)


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(
        logits, labels, reduction="none"
    ).mean(1)


def _check_additive(loss: Tensor, expected: Tensor) -> None:
    """Raise if the batch's loss is finite and not the weighted sum of the examples'."""
    got, wanted = float(loss), float(expected)
    tolerance = _TOLERANCE.get(loss.dtype, _LOW_PRECISION_TOLERANCE)
    if abs(got - wanted) > tolerance * max(1.0, abs(wanted)):
        raise ValueError(
            "per-example gradients need a loss that is the mean of the examples' own "
            f"losses, here {wanted:.6g}, got {got:.6g}: train with the model's own "
            "loss, or pass per_example=False."
        )
