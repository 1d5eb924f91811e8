"""The gradient of a subspace's coordinates, folded as parameters' gradients appear."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.sketch import ModelSketch

Slot = tuple[nn.Module, str, str]  # a module, its attribute, the parameter's name


class OmegaGradient:
    """Sums the sketches of parameters' gradients during backward passes.

    Args:
        model_sketch: S, to all of its coordinates.
        omega: the first coordinates.
        when_taken: called when autograd has reached omega.
    """

    def __init__(
        self,
        model_sketch: ModelSketch,
        omega: Tensor,
        when_taken: Callable[[], None],
    ) -> None:
        self._model_sketch = model_sketch
        self.omega = omega
        self._when_taken = when_taken
        self._sum: Accumulator | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters whose gradients are summed."""
        return [name for name, _ in self._model_sketch.shapes]

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one use of a parameter."""
        if self._sum is None:
            self._sum = self._model_sketch.sketch_sum()
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        with torch.autocast(gradient.device.type, enabled=False):
            self._sum.add(name, dense.reshape(1, -1))

    def take(self) -> Tensor:
        """The gradient of omega from all that was added; nothing is left."""
        self._when_taken()
        total, self._sum = self._sum, None
        if total is None:
            return torch.zeros_like(self.omega)
        with torch.autocast(self.omega.device.type, enabled=False):
            gradient = total.result().squeeze(0)[: len(self.omega)]
        return gradient.to(self.omega)


def uses_in_graph(
    slots: Iterable[Slot], parameters: dict[str, nn.Parameter], gradient: OmegaGradient
) -> list[Tensor]:
    """For each slot, its parameter as a function of omega for autograd.

    The tensors share the parameters' memory: nothing is computed. Going backward, each
    use hands its gradient to `gradient` and forgets it, so that no more than one is
    there at a time; autograd reaches omega after all of them.
    """
    anchor = _Anchor.apply(gradient.omega, gradient)
    return [_Use.apply(anchor, parameters[name], name, gradient) for *_, name in slots]


class _Anchor(torch.autograd.Function):
    """Stands between omega and all uses; its backward runs when theirs have."""

    @staticmethod
    def forward(ctx: Any, omega: Tensor, gradient: OmegaGradient) -> Tensor:
        ctx.gradient = gradient
        return omega.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *_: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.gradient.take(), None


class _Use(torch.autograd.Function):
    """A parameter where one module uses it."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, parameter: Tensor, name: str, gradient: OmegaGradient
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.name, ctx.gradient, ctx.anchor_dtype = name, gradient, anchor.dtype
        return parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, None
        ctx.gradient.add(ctx.name, gradient)
        zero = torch.zeros((), dtype=ctx.anchor_dtype, device=gradient.device)
        return zero, None, None, None
