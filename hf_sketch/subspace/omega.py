"""The coordinates of subspace adapters, and their gradient, folded as it appears."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.config import SubspaceConfig

_RANDOM: Final = 0.02  # of what omega is drawn at random with


class Omega(nn.Module):
    """The coordinates of one adapter, named as those of LoRA's layers are.

    Shapes:
        weight (dim,)
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class Coordinates(nn.Module, BaseTunerLayer):
    """The coordinates of all adapters; what PEFT takes for the adapter's layer."""

    adapter_layer_names = ("subspace_omega",)

    def __init__(self) -> None:
        super().__init__()
        self.subspace_omega = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._like: tuple[Tensor, ...] = ()  # in a tuple, so as not to register it

    @property
    def weight(self) -> Tensor:
        """One of the parameters that move: PEFT takes device and dtype from it."""
        return self._like[0]

    @property
    def bias(self) -> Tensor:
        """Raise AttributeError: there is none."""
        raise AttributeError("coordinates have no bias")

    def add(self, adapter_name: str, config: SubspaceConfig, like: Tensor) -> None:
        """Zeros for a new adapter or, for tests, random numbers, in a model's dtype."""
        self._like = (like,)
        omega = torch.zeros(config.dim, dtype=like.dtype, device=like.device)
        if not config.init_weights:
            omega.normal_(std=_RANDOM)
        self.subspace_omega[adapter_name] = Omega(omega)

    def of(self, adapter_name: str) -> Omega:
        """The coordinates of an adapter."""
        return cast(Omega, self.subspace_omega[adapter_name])


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
        """Names of the parameters whose gradients are summed."""
        return [name for name, _ in self._model_sketch.shapes]

    def uses(self, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
        """Yield each use of a parameter, by name, as a function of omega for autograd.

        The tensors share the parameters' memory: nothing is computed. Going backward,
        each use hands over its gradient and forgets it, so that no more than one is
        there at a time; autograd reaches omega after all of them.
        """
        anchor = _Anchor.apply(self.omega, self)
        for name, parameter in parameters:
            yield _Use.apply(anchor, parameter, name, self)

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
        zero = None
        if gradient is not None:
            ctx.gradient.add(ctx.name, gradient)
            zero = torch.zeros((), dtype=ctx.anchor_dtype, device=gradient.device)
        return zero, None, None, None
