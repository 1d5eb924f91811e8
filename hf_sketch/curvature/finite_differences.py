"""Moving parameters by small steps, there and exactly back."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from hf_sketch.model.accumulator import SketchSum
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
    """The derivative along a direction of what a function gives at the parameters.

    Args:
        parameters: of the model; bit for bit as before when this returns.
        direction: gives its parts by name, one parameter after the other, in order.
        norm: of the direction, at least roughly.
        evaluate: the function.
    """
    moved = _Displacement(parameters, norm)
    parts = moved.both_sides(direction, evaluate)
    change = _relative_change(*parts)
    if change > _LARGEST_CHANGE:
        moved.step *= max(_LEAST_FRACTION, _TARGET_CHANGE / change)
        del parts  # as large as the model, perhaps
        parts = moved.both_sides(direction, evaluate)
    ahead, behind = parts
    for one, other in zip(ahead, behind, strict=True):
        one.sub_(other).div_(2 * moved.step)
    return ahead


class _Displacement:
    """The parameters of a model, moved from theta by a step along a direction.

    Args:
        parameters: of the model, by name.
        norm: of the direction, at least roughly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], norm: float) -> None:
        self._parameters = parameters
        theta = _norm([p.detach() for p in parameters.values()])
        self.step = _STEP * (theta or 1.0) / (norm or 1.0)
        self._before: dict[str, _Before] = {}

    def both_sides(
        self,
        direction: Callable[[], Iterable[tuple[str, Tensor]]],
        evaluate: Callable[[], list[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What a function gives at theta + step * direction, and at the opposite."""
        device = next(iter(self._parameters.values())).device
        state = random_state(device)  # losses may draw; both sides draw the same
        with self.forward(direction()):
            with kept_random_state(state, device):
                ahead = evaluate()
            self.reverse()
            with kept_random_state(state, device):
                return ahead, evaluate()

    @contextmanager
    def forward(self, direction: Iterable[tuple[str, Tensor]]) -> Generator[None]:
        """Move along the direction, which is read one parameter after the other.

        Leaving it puts the parameters back, bit for bit.
        """
        try:
            with torch.no_grad():
                for name, part in direction:
                    parameter = self._parameters[name]
                    moved = parameter.add(part.to(parameter.dtype), alpha=self.step)
                    self._move(name, parameter.detach().clone(), moved)
            yield
        finally:
            with torch.no_grad():
                for name, before in self._before.items():
                    parameter = self._parameters[name]
                    parameter.copy_(before.restored(parameter))
            self._before = {}

    def reverse(self) -> None:
        """From theta + d to theta - d, with the very d that rounding left."""
        with torch.no_grad():
            for name, before in self._before.items():
                parameter = self._parameters[name]
                theta = before.restored(parameter)
                self._move(name, theta, (theta - parameter).add_(theta))

    def _move(self, name: str, theta: Tensor, moved: Tensor) -> None:
        """Put a parameter elsewhere, and remember where it was."""
        before = self._before[name] = _Before(theta)
        self._parameters[name].copy_(moved)
        before.compress(moved)


class _Before:
    """What a tensor was before it moved a little, in half of its memory.

    Read as integers, float32 numbers and those near them differ by few units, kept in
    16 bits; the elements of which this is not so are kept as they were.

    Args:
        theta: the tensor, which must not change.
    """

    def __init__(self, theta: Tensor) -> None:
        self._theta: Tensor | None = theta

    def compress(self, moved: Tensor) -> None:
        """Keep what is needed to restore it from where it went, if that is less."""
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
        """The tensor as it was, bit for bit, from where it is now."""
        if self._theta is not None:
            return self._theta
        theta = moved.detach().view(torch.int32).add(self._units).view(torch.float32)
        flat = theta.reshape(-1)
        flat[self._far] = self._values
        return flat.view_as(moved)


@contextmanager
def gradients_into(
    total: SketchSum, parameters: Mapping[str, nn.Parameter]
) -> Generator[None]:
    """Sketch each parameter's gradient as a backward pass gives it, and drop it.

    Gradients and hooks that the parameters had are theirs again afterwards.
    """
    # Hooks of others may step an optimizer. They have no public name.
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


def _relative_change(ahead: list[Tensor], behind: list[Tensor]) -> float:
    """|ahead - behind| / (|ahead| + |behind|)."""
    pairs = zip(ahead, behind, strict=True)
    changes = [torch.linalg.vector_norm(one - other) for one, other in pairs]
    size = _norm(ahead) + _norm(behind)
    return _norm(changes) / size if size else 0.0


def _norm(parts: list[Tensor]) -> float:
    norms = torch.stack([torch.linalg.vector_norm(part) for part in parts])
    return float(norms.to(torch.float64).norm())
