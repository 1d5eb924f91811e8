"""Hooks on the gradients of parameters, as those that train some rows only."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def hooks_of(parameter: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """Return what `parameter.register_hook` was given, to which no public way leads."""
    tensor: Any = parameter
    return list((tensor._backward_hooks or {}).values())


def changes_gradient(parameter: Tensor) -> bool:
    """Return whether hooks make something else of a gradient of ones."""
    plain = torch.ones_like(parameter, requires_grad=False)
    gradient = plain
    for hook in hooks_of(parameter):
        changed = hook(gradient.clone())
        gradient = gradient if changed is None else changed
    return not torch.equal(gradient, plain)


@contextmanager
def unhooked(outputs: Sequence[Tensor]) -> Generator[None]:
    """Within, gradients reach tensors as they are, and none of their hooks runs.

    DeepSpeed's hooks on a model's outputs divide gradients and begin its own backward
    pass.
    """
    tensors: Sequence[Any] = outputs
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [{**own} for own in hooks]
    for own in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, earlier in zip(hooks, kept, strict=True):
            own.update(earlier)


def read_last(output: Tensor, read: Callable[[Tensor | None], None]) -> None:
    """Call `read` with the gradient that the tensor's own hooks have left.

    DeepSpeed's divide that of a loss. DDP passes None on to outputs that nobody uses.
    """
    place = output.output_nr

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        read(gradients[place])

    assert output.grad_fn is not None
    output.grad_fn.register_prehook(hook)
