"""Hooks on the gradients of parameters, as those that train some rows only."""

from collections.abc import Callable
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
