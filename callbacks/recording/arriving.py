"""The row of a step whose gradient is gone before any callback can read it."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.processes import reduced
from hf_sketch.store.rows import row_columns

from .clipping import ROUNDING, norm_of
from .steps import StepReader, left_gradients

_LAYERWISE = ("lomo_optim",)  # packages whose optimizers step within the backward pass
_ADDED = 1e-6  # to the norm, by DeepSpeed, before it divides by it


class ArrivingGradients(StepReader):
    """Sketches gradients as the backward pass brings them to the parameters.

    DeepSpeed and layer-wise optimizers (GaLore's, LOMO) have stepped, and dropped the
    gradients, when `training_step` returns.

    Args:
        model_sketch: the map.
        parameters: what is trained, by name.
        engine: DeepSpeed's; None for a layer-wise optimizer, which clips nothing.
        optimizer: the one that DeepSpeed calls with clipped gradients, where it says
            nobody their norm: without ZeRO and in float32.
    """

    def __init__(
        self,
        model_sketch: ModelSketch,
        parameters: Mapping[str, nn.Parameter],
        engine: Any,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._model_sketch, self._parameters = model_sketch, parameters
        self._engine, self._optimizer = engine, optimizer
        self.start_step()

    def start_step(self) -> None:
        self._sum: Accumulator = self._model_sketch.sketch_sum()
        self._square, self._micro_batches = 0.0, 0
        self._stepped: tuple[Tensor, Tensor] | None = None  # norm, and norm of sketch

    @contextmanager
    def watched(self, sketcher: ExampleSketcher | None) -> Generator[None]:
        self._micro_batches += 1
        with ExitStack() as hooks:
            for name, parameter in self._parameters.items():
                hook = partial(self._add, name, sketcher)
                hooks.callback(parameter.register_hook(hook).remove)
            if self._optimizer is not None:
                handle = self._optimizer.register_step_pre_hook(self._note_step)
                hooks.callback(handle.remove)
            yield

    def columns(
        self, position: Mapping[str, float], loss_scale: float
    ) -> dict[str, Tensor]:
        processes = PartialState()
        total = torch.zeros(1, self._model_sketch.row_size, device=processes.device)
        if self._sum.names:
            total = self._sum.result()
        share = loss_scale * processes.num_processes
        sketch = reduced(total, "sum") / share
        if self._stepped is None:
            norm = self._norm(sketch, share)
            factor = self._clip_factor(norm)
        else:
            norm, size = self._stepped
            before = torch.linalg.vector_norm(sketch)
            factor = torch.where(before > 0, size / before, 1.0)
            factor = torch.where((factor - 1).abs() < ROUNDING, 1.0, factor)
            norm = norm / factor
        return row_columns(
            sketch * factor,
            **position,
            gradient_norm=norm.reshape(1),
            clip_factor=factor.reshape(1),
        )

    def _add(
        self, name: str, sketcher: ExampleSketcher | None, gradient: Tensor
    ) -> None:
        """Sketch what comes to a parameter, from all of its uses."""
        if sketcher is None or sketcher.in_flight:  # no pass of its own
            gradient = gradient.detach()
            self._square = self._square + gradient.double().square().sum()
            # An optimizer may change it before the sum is taken.
            self._sum.add(name, gradient.reshape(1, -1).clone())

    def _note_step(self, *_: Any) -> None:
        """Note what the optimizer sees, which has been clipped."""
        given = self._parameters.items()
        gradients = {name: p.grad for name, p in given if p.grad is not None}
        size = torch.linalg.vector_norm(self._model_sketch.sketch(gradients))
        self._stepped = norm_of(gradients.values(), in_shards=False), size

    def _norm(self, sketch: Tensor, share: float) -> Tensor:
        """Return the gradient's norm; its sketch's where nobody knows that."""
        known = None
        if self._engine is not None:
            known = self._engine.get_global_grad_norm()
        elif self._micro_batches == 1 and PartialState().num_processes == 1:
            known = self._square**0.5 / share
        if known is None:
            return torch.linalg.vector_norm(sketch)
        return torch.as_tensor(known, device=sketch.device, dtype=torch.float64)

    def _clip_factor(self, norm: Tensor) -> Tensor:
        """Return what the gradient was multiplied by before the step."""
        most = 0.0 if self._engine is None else float(self._engine.gradient_clipping())
        if most <= 0:
            return torch.ones_like(norm)
        return (most / (norm + _ADDED)).clamp(max=1.0)


def step_reader(
    model_sketch: ModelSketch, model: nn.Module, optimizer: Optimizer, engine: Any
) -> StepReader:
    """Return what reads the gradients of a model's steps."""
    parameters = model_sketch.parameters_of(model)
    if steps_early(optimizer, engine):
        inner: Any = _inner(optimizer)  # one of DeepSpeed's own is no Optimizer
        plain = engine is not None and isinstance(inner, Optimizer)
        seen = inner if plain else None
        return ArrivingGradients(model_sketch, parameters, engine, seen)
    return left_gradients(model_sketch, parameters)


def steps_early(optimizer: Optimizer, engine: Any) -> bool:
    """Whether an optimizer steps within `training_step`; `engine` is DeepSpeed's."""
    inner = _inner(optimizer)
    package = type(inner).__module__.partition(".")[0]
    layerwise = isinstance(inner, LayerWiseDummyOptimizer) or package in _LAYERWISE
    return layerwise or engine is not None


def check_steps_late(optimizer: Optimizer, engine: Any) -> None:
    """Raise if an optimizer steps where no callback sees the weights before it.

    Raises:
        ValueError: it does.
    """
    if steps_early(optimizer, engine):
        raise ValueError(
            "updates=True does not support DeepSpeed, nor optimizers that step in the "
            "backward pass. Pass updates=False."
        )


def learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of an optimizer's first parameters."""
    inner = _inner(optimizer)
    if isinstance(inner, LayerWiseDummyOptimizer):
        optimizers: Mapping[Any, Optimizer] = inner.optimizer_dict or {}
        inner = next(iter(optimizers.values()), inner)
    return float(inner.param_groups[0]["lr"])


def loss_scale(optimizer: Optimizer) -> float:
    """Return what the loss is multiplied by before the backward pass, under fp16."""
    if (scaler := getattr(optimizer, "scaler", None)) is not None:
        return float(scaler.get_scale())
    return float(getattr(_inner(optimizer), "loss_scale", 1.0))  # DeepSpeed's


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that Accelerate has wrapped."""
    wrapped = isinstance(optimizer, AcceleratedOptimizer)
    return optimizer.optimizer if wrapped else optimizer
