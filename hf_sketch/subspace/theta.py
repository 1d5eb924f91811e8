"""Forward and backward passes of a base model at theta0 + S.T omega."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.base import BaseModel
from hf_sketch.subspace.omega import OmegaGradient
from hf_sketch.subspace.weights import MovedWeights

Adapter = tuple[str, ModelSketch, Tensor]


class Theta:
    """Puts theta = theta0 + S.T omega in the places of parameters while a model runs.

    Args:
        model: the base model, at theta0.
        on_disk: see `MovedWeights`.
        active: returns the name, S and omega of the adapter that moves the parameters;
            None if there is none, or if it is merged into them.
    """

    def __init__(
        self, model: nn.Module, on_disk: bool, active: Callable[[], Adapter | None]
    ) -> None:
        self.base = BaseModel(model)
        self._weights = MovedWeights(on_disk)
        self._active = active
        self._now: tuple[str, Tensor] | None = None  # adapter and omega of theta
        self._depth = 0
        self._recomputes = False
        own = cast(Any, self)  # the decorator's types hide that these are methods
        self._handles = [
            handle
            for module in self.base.entrances()
            for handle in (
                module.register_forward_pre_hook(own._before),
                module.register_forward_hook(own._after, always_call=True),
            )
        ]

    def restore(self) -> None:
        """Leave the base model at theta0."""
        self.base.put_back()
        self._weights.restore()
        self._now = None

    def merge(self) -> None:
        """Leave the active adapter's theta in the parameters."""
        adapter = self._active()
        assert adapter is not None
        self.base.put_back()
        self._compute(*adapter)
        self._weights.exchange()

    def unmerge(self) -> None:
        """Undo `merge`."""
        self._weights.exchange()

    def close(self, keep: bool) -> None:
        """Let the model go: at theta0, or at theta if that was merged and is kept."""
        self.base.put_back()
        if not keep:
            self.restore()
        for handle in self._handles:
            handle.remove()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follow parameters that were moved to a device or cast."""
        self._weights.apply(function)
        self.base.find_parameters()

    def _compute(self, name: str, sketch: ModelSketch, omega: Tensor) -> None:
        """Compute theta, unless omega is as it was when that was done last."""
        omega = omega.detach()
        if self._now is not None and self._now[0] == name:
            before = self._now[1]
            if before.shape == omega.shape and torch.equal(before, omega):
                return
        with (
            torch.inference_mode(False),
            torch.autocast(omega.device.type, None, False),
        ):
            self._now = name, omega.clone()
            if not omega.any():
                self._weights.restore()
                return
            vector = omega.new_zeros(sketch.out_size)
            vector[: len(omega)] = omega
            self._weights.move(self.base.parameters, sketch, vector)

    @torch.compiler.disable
    def _before(self, *_: Any) -> None:
        """Before the outermost forward pass: theta in the places of the parameters."""
        self._depth += 1
        if self._depth > 1:
            return
        self.base.put_back()
        adapter = self._active()
        if adapter is None:
            return
        self._compute(*adapter)
        sketch, omega = adapter[1:]
        uses = self.base.uses([shape[0] for shape in sketch.shapes])
        tensors = [
            (use[2], self._weights.at(use[2], self.base.parameters[use[2]]))
            for use in uses
        ]
        trains = torch.is_grad_enabled() and omega.requires_grad
        self._recomputes = trains and self.base.recomputes()
        if trains:
            gradient = OmegaGradient(sketch, omega, self.base.put_back)
            self.base.put(uses, gradient.uses(tensors))
        else:
            self.base.put(uses, (tensor for _, tensor in tensors))

    @torch.compiler.disable
    def _after(self, *_: Any) -> None:
        """After it: the parameters, unless the backward pass calls modules again."""
        self._depth -= 1
        if self._depth == 0 and not self._recomputes:
            self.base.put_back()
