"""Forward and backward passes of a base model at theta0 + S.T omega."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.base import BaseModel
from hf_sketch.subspace.omega import OmegaGradient
from hf_sketch.subspace.weights import MovedWeights

Adapter = tuple[str, ModelSketch, Tensor]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A forward pass for training: its adapter, and where which tensors were used."""

    sketch: ModelSketch
    omega: Tensor
    uses: list[tuple[nn.Module, str, str]]
    tensors: list[tuple[str, Tensor]]


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
        self._merged = False
        self._running: _Pass | None = None
        self._awaited: list[_Pass] = []  # their backward passes call modules again
        own = cast(Any, self)  # the decorator's types hide that these are methods
        self._handles = [
            handle
            for module in self.base.entrances()
            for handle in (
                module.register_forward_pre_hook(own._before),
                module.register_forward_hook(own._after, always_call=True),
                module.register_load_state_dict_pre_hook(own._before_loading),
                module.register_state_dict_pre_hook(own._before_saving),
            )
        ]

    def restore(self) -> None:
        """Leave the base model at theta0.

        Raises:
            RuntimeError: theta0 is on disk, and a backward pass still needs theta.
        """
        self._check_free()
        self.base.put_back()
        self._weights.restore()
        self._now = None

    def merge(self) -> None:
        """Leave the active adapter's theta in the parameters."""
        adapter = self._active()
        assert adapter is not None
        self._leave()
        self._compute(*adapter)
        self._weights.exchange()
        self._merged = True

    def unmerge(self) -> None:
        """Undo `merge`."""
        self._weights.exchange()
        self._merged = False

    def close(self, keep: bool) -> None:
        """Let the model go: at theta0, or at theta if that was merged and is kept."""
        self._leave()
        if not keep:
            self.restore()
        for handle in self._handles:
            handle.remove()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follow parameters that were moved to a device or cast."""
        self._leave()
        self._weights.apply(function)
        self._now = None
        self.base.find_parameters()

    def _leave(self) -> None:
        """Put the parameters back, whatever backward passes are still to come."""
        self._awaited.clear()
        self.base.put_back()

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
            if self._now is not None and self._now[0] != name:
                self.restore()  # a backward pass may still need the other's theta
            self._now = None  # if memory runs out
            if omega.any():
                vector = omega.new_zeros(sketch.out_size)
                vector[: len(omega)] = omega
                self._weights.move(self.base.parameters, sketch, vector)
            else:
                self._weights.restore()
            self._now = name, omega.clone()

    @torch.compiler.disable
    def _before(self, *_: Any) -> None:
        """Before the outermost forward pass: theta in the places of the parameters."""
        self._depth += 1
        if self._depth > 1:
            return
        self.base.put_back()
        self._running = None
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
        if not (torch.is_grad_enabled() and omega.requires_grad):
            self.base.put(uses, (tensor for _, tensor in tensors))
            return
        own = _Pass(sketch, omega, uses, tensors)
        gradient = OmegaGradient(sketch, omega, partial(self._forget, own))
        self.base.put(uses, gradient.uses(tensors))
        if self.base.recomputes():
            self._running = own
            self._awaited.append(own)
            # Also where the loss is dropped without a backward pass.
            weakref.finalize(gradient, self._forget, own).atexit = False

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it: the parameters, or theta if a backward pass calls modules again.

        Between a forward and its backward pass there may be others, as of a reference.
        """
        self._depth -= 1
        if self._depth:
            return
        if output is None and self._running in self._awaited:  # it has failed
            self._awaited.remove(self._running)
        self._put_awaited()

    def _put_awaited(self) -> None:
        self.base.put_back()
        if not self._awaited:
            return
        own = self._awaited[-1]
        with torch.inference_mode(False), torch.enable_grad():
            # Of a graph of their own: only what modules save is used, and training's
            # must not be kept here. PEFT freezes the omega of a disabled adapter.
            omega = own.omega.detach().requires_grad_()
            again = OmegaGradient(own.sketch, omega, self.base.put_back)
            self.base.put(own.uses, again.uses(own.tensors))

    def _forget(self, own: _Pass) -> None:
        """After a pass's backward pass, or if there will be none."""
        if own in self._awaited:
            self._awaited.remove(own)
            if self._depth == 0:
                self._put_awaited()

    def _check_free(self) -> None:
        if self._weights.on_disk and self._awaited:
            raise RuntimeError(
                "With base_on_disk=True and activation checkpointing, run the backward "
                "pass before you switch, disable or save adapters. Or pass "
                "base_on_disk=False."
            )

    def _before_saving(self, *_: Any) -> None:
        """Let the state dict have theta0, also with `on_disk`."""
        if self._weights.on_disk and not self._merged:
            self.restore()

    def _before_loading(self, *_: Any) -> None:
        """Make way for another theta0."""
        if not self._merged:
            self.restore()
            self._weights.forget()
