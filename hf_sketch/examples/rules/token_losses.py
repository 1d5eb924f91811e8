"""Losses that models take of their scores, before they are summed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_IGNORED = -100
_ELEMENTS_AT_ONCE = 2**18


def token_losses(
    logits: Tensor, labels: Tensor, problem_type: str | None, causal: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield losses and how many each counts for, by every rule that fits the shapes.

    Shapes:
        yields (b,) or (b, t), twice
    """
    if logits.dim() == 1:  # one score per example
        logits = logits.unsqueeze(1)
    classes = not labels.is_floating_point() and problem_type != "regression"
    classes = classes and logits.shape[-1] > 1
    virtual = (
        logits.shape[1] - labels.shape[1] if logits.dim() > labels.dim() > 1 else 0
    )
    if classes and virtual > 0:  # PEFT's virtual tokens, which lie before the others
        labels = functional.pad(labels, (virtual, 0), value=_IGNORED)
    if classes and labels.numel() == logits[..., 0].numel():
        labels = labels.view(logits.shape[:-1]).to(logits.device)
        normalizers = _log_sum_exp(logits)
        choices = [labels]
        if logits.dim() == 3:
            choices.append(functional.pad(labels[:, 1:], (0, 1), value=_IGNORED))
        for chosen in reversed(choices) if causal else choices:
            yield _cross_entropy(logits, chosen, normalizers)
    elif logits.dim() == 2 and labels.numel() == logits.numel():
        yield from _score_losses(logits, labels.view_as(logits), problem_type)


def span_losses(
    scores: Sequence[Tensor], places: Sequence[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `token_losses` does, for the start and the end of a span.

    Spans that lie outside the tokens have no loss.

    Shapes:
        scores (b, t), places (b,), of the start and of the end
        yields (b,), twice
    """
    if not all(isinstance(x, Tensor) for x in places):
        return
    logits = torch.stack(tuple(scores), 1)
    labels = torch.stack([x.view(-1) for x in places], 1).clamp(min=0)
    labels = labels.masked_fill(labels >= logits.shape[-1], _IGNORED)
    losses, counted = _cross_entropy(logits, labels, _log_sum_exp(logits))
    if torch.equal(counted[:, 0], counted[:, 1]):
        yield losses.mean(1), counted[:, 0]


def _score_losses(
    logits: Tensor, labels: Tensor, problem_type: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield losses of a number or of a yes or no per score."""
    if problem_type == "regression" or logits.shape[1] == 1:
        yield _mean((logits - labels).square())
    if problem_type != "regression":
        yield _mean(
            functional.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), reduction="none"
            )
        )


def _mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over an example's scores, which counts once."""
    mean = losses.mean(1)
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    return mean, torch.ones_like(mean)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Sum over the classes, a few rows at a time: all at once would be copied."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.flatten(0, -2)
    rows = max(1, _ELEMENTS_AT_ONCE // flat.shape[-1])
    parts = [some.to(dtype).logsumexp(-1) for some in flat.split(rows)]
    return torch.cat(parts).view(logits.shape[:-1])


def _cross_entropy(
    logits: Tensor, labels: Tensor, normalizers: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every label that is not ignored."""
    counted = labels != _IGNORED
    # Labels that are no classes make no loss that fits, and must not end the program.
    classes = labels.clamp(0, logits.shape[-1] - 1)
    chosen = logits.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    losses = (normalizers - chosen).where(counted, 0)
    return losses, counted.to(losses)
