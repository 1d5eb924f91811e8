"""How each kind of module's weights get their per-example gradients."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Contribution(NamedTuple):
    """A parameter's per-example gradients.

    Without `right`, row i of `left` (b, size) is example i's gradient; with it, example
    i's gradient is sum_t left[i, t] (x) right[i, t], and integer `left` (b, t) stands
    for one-hot vectors.
    """

    attribute: str
    left: Tensor
    right: Tensor | None = None


Rule = Callable[[nn.Module, Tensor, Tensor], Iterator[Contribution]]


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that fits the module's forward pass, or None.

    A subclass that overrides `forward` has no rule: what it computes is unknown.

    Raises:
        ValueError: an Embedding's gradients depend on the whole batch.
    """
    if isinstance(module, nn.Embedding):
        _check_embedding(module)
    return _RULES.get(type(module).forward)


def _linear(module: nn.Module, x: Tensor, gradient: Tensor) -> Iterator[Contribution]:
    """Linear: y = W x + b."""
    gradient = _tokens(gradient)
    yield Contribution("weight", gradient, _tokens(x))
    yield Contribution("bias", gradient.sum(1))


def _embedding(
    module: nn.Module, ids: Tensor, gradient: Tensor
) -> Iterator[Contribution]:
    """Embedding: y = W[ids]; the padding row gets no gradient."""
    assert isinstance(module, nn.Embedding)
    ids, gradient = ids.flatten(1), _tokens(gradient)
    if module.padding_idx is not None:
        gradient = gradient * (ids != module.padding_idx).unsqueeze(-1)
    yield Contribution("weight", ids, gradient)


def _check_embedding(module: nn.Embedding) -> None:
    """Raise if an example's gradient depends on its batch-mates."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            "per-example gradients need an Embedding without max_norm, "
            f"scale_grad_by_freq and sparse, got max_norm={module.max_norm}, "
            f"scale_grad_by_freq={module.scale_grad_by_freq}, sparse={module.sparse}: "
            "turn them off, or pass per_example=False."
        )


def _layer_norm(
    module: nn.Module, x: Tensor, gradient: Tensor
) -> Iterator[Contribution]:
    """LayerNorm: y = W * normalised(x) + b."""
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)
    size = torch.Size(shape).numel()
    normalised = functional.layer_norm(x, shape, eps=module.eps)
    gradient = gradient.reshape(len(gradient), -1, size)
    weighted = gradient * normalised.reshape(gradient.shape)
    yield Contribution("weight", weighted.sum(1))
    yield Contribution("bias", gradient.sum(1))


def _tokens(x: Tensor) -> Tensor:
    """Merge all dimensions between the batch and the features: (b, t, features)."""
    return x.reshape(len(x), -1, x.shape[-1])


_RULES: dict[Callable[..., Tensor], Rule] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
}
