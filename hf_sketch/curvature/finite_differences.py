"""Moving parameters by small steps, there and exactly back."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from hf_sketch.curvature.vectors import norm_of
from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.state import kept_random_state, random_state
from hf_sketch.sketches.transforms.lazy import is_lazy

# Of the parameters' norm. On tiny GPT-2, Llama, BERT, T5, BART and ViT in float32 the
# product with a random direction is within 1e-3, and kinks are rarely crossed.
_STEP: Final = 3e-5
# Where the gradient itself changes by more than this fraction on the way, as along the
# sharpest directions of a fine-tuned model, truncation shows: a shorter step is taken.
_LARGEST_CHANGE: Final = 4e-2
_TARGET_CHANGE: Final = 1e-2
_LEAST_FRACTION: Final = 0.03
_MOST_FAR: Final = 0.1  # of the elements; each takes 12 bytes


def central_difference(
    parameters: Mapping[str, nn.Parameter],
    direction: Callable[[], Iterable[tuple[str, Tensor]]],
    norm: float,
    evaluate: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """Return the derivative of a function of the parameters along a direction.

    Args:
        parameters: the model's, by name; bit for bit the same afterwards.
        direction: yields its parts by name, in the order of the parameters.
        norm: the direction's norm, at least roughly.
        evaluate: the function, of the parameters as they are when it is called.
    """
    theta = norm_of(parameters.values())
    step = _STEP * (theta or 1.0) / (norm or 1.0)
    sides = _both_sides(parameters, direction, step, evaluate)
    change = _relative_change(*sides)
    if change > _LARGEST_CHANGE:
        step *= max(_LEAST_FRACTION, _TARGET_CHANGE / change)
        del sides  # as large as the model, perhaps
        sides = _both_sides(parameters, direction, step, evaluate)
    ahead, behind = sides
    for one, other in zip(ahead, behind, strict=True):
        one.sub_(other).div_(2 * step)
    return ahead


def _both_sides(
    parameters: Mapping[str, nn.Parameter],
    direction: Callable[[], Iterable[tuple[str, Tensor]]],
    step: float,
    evaluate: Callable[[], list[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluate at theta + step * direction and at the opposite point."""
    device = next(iter(parameters.values())).device
    state = random_state(device)  # losses may draw; both sides draw the same
    before: dict[str, _Before] = {}

    def move(name: str, theta: Tensor, moved: Tensor) -> None:
        before[name] = _Before(theta)  # known before the move, if that is interrupted
        parameters[name].copy_(moved)
        before[name].compress(moved)

    try:
        with torch.no_grad():
            for name, part in direction():
                theta = parameters[name].detach()
                moved = theta.add(part.to(theta.dtype), alpha=step)
                move(name, theta.clone(), moved)
        with kept_random_state(state, device):
            ahead = evaluate()
        with torch.no_grad():  # to theta - d, with the very d that rounding left
            for name, kept in before.items():
                moved = parameters[name].detach()
                theta = kept.restored(moved)
                move(name, theta, (theta - moved).add_(theta))
        with kept_random_state(state, device):
            return ahead, evaluate()
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                parameters[name].copy_(kept.restored(parameters[name]))


def _relative_change(ahead: list[Tensor], behind: list[Tensor]) -> float:
    """|ahead - behind| / (|ahead| + |behind|)."""
    size = norm_of(ahead) + norm_of(behind)
    pairs = zip(ahead, behind, strict=True)
    return norm_of(one - other for one, other in pairs) / size if size else 0.0


class _Before:
    """A tensor as it was before it moved a little, in half of its memory.

    Read as integers, float32 numbers and their near neighbors differ by few units,
    which fit 16 bits. The elements that moved further are kept whole.

    Args:
        theta: the tensor, which must not change.
    """

    def __init__(self, theta: Tensor) -> None:
        self._theta: Tensor | None = theta

    def compress(self, moved: Tensor) -> None:
        """Keep only what restores it from where it went, if that is less."""
        theta = self._theta
        if theta is None or theta.dtype != torch.float32 or is_lazy(theta):
            return
        units = theta.view(torch.int32) - moved.view(torch.int32)
        self._units = units.to(torch.int16)
        self._far = (self._units != units).reshape(-1).nonzero().squeeze(1)
        if len(self._far) < _MOST_FAR * theta.numel():
            self._values = theta.reshape(-1)[self._far]
            self._theta = None
        else:
            del self._units, self._far

    def restored(self, moved: Tensor) -> Tensor:
        """Return the tensor as it was, bit for bit, from where it is now."""
        if self._theta is not None:
            return self._theta
        theta = moved.detach().view(torch.int32).add(self._units).view(torch.float32)
        flat = theta.reshape(-1)
        flat[self._far] = self._values
        return flat.view_as(moved)


@contextmanager
def gradients_into(
    total: Accumulator, parameters: Mapping[str, nn.Parameter]
) -> Generator[None]:
    """Sketch each parameter's gradient as a backward pass gives it, and drop it.

    The parameters get their own gradients and hooks back afterwards.
    """
    # Other hooks may step an optimizer. torch (2.13) has no public name for them.
    plain: dict[str, Any] = dict(parameters)
    kept = {name: (p.grad, p._post_accumulate_grad_hooks) for name, p in plain.items()}
    handles: list[Any] = []

    def take(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        total.add(name, gradient.reshape(1, -1))

    try:
        for name, parameter in plain.items():
            parameter.grad = parameter._post_accumulate_grad_hooks = None
            hook = partial(take, name)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in plain.items():
            parameter.grad, parameter._post_accumulate_grad_hooks = kept[name]
