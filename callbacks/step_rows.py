"""Rows of the store with each step's gradient."""

import math
from collections.abc import Callable

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from hf_sketch.model_sketch import ModelSketch
from hf_sketch.rows import PER_STEP
from hf_sketch.writer import SketchWriter

from .moment import Moment

_SUM_TOLERANCE = 1e-3
_LOW_PRECISION_SUM_TOLERANCE = 5e-2


class StepRecorder:
    """Writes a row for each optimizer step: the gradient that the optimizer sees.

    The Trainer clips before any callback hears of the step, so the norm before clipping
    is read by hooks, parameter by parameter, as the step's last backward pass ends.

    Args:
        model: the model that trains.
        model_sketch: the map.
    """

    def __init__(self, model: nn.Module, model_sketch: ModelSketch) -> None:
        self._model_sketch = model_sketch
        self._parameters = model_sketch.parameters_of(model)
        self._recording = False
        self._norms: dict[str, Tensor] = {}
        self._gradient_state = GradientState()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self._parameters.items()
        ]

    def start_step(self, recording: bool) -> None:
        """An optimizer step begins."""
        self._recording = recording
        self._norms = {}

    def end_step(
        self, moment: Moment, writer: SketchWriter, loss_scale: float
    ) -> Tensor | None:
        """The optimizer is about to step: write the row.

        Args:
            moment: the step.
            writer: where it goes.
            loss_scale: of a GradScaler; the Trainer undoes it where it clips.

        Returns:
            the sketch of the step's gradient before clipping, (out_size,), if recorded.
        """
        if not self._recording:
            return None
        norm, factor = self._clipping()
        # Near 1 before the scale is undone, near 1 / loss_scale after.
        scaled = abs(math.log(factor or 1)) < abs(math.log((factor or 1) * loss_scale))
        norm, clip_factor = norm / loss_scale, factor if scaled else factor * loss_scale
        gradients = {
            n: p.grad for n, p in self._parameters.items() if p.grad is not None
        }
        sketch = self._model_sketch.sketch(gradients)
        if scaled:
            sketch = sketch / loss_scale
        row = {
            "epoch": moment.epoch,
            "step": moment.step,
            "learning_rate": moment.learning_rate,
            "gradient_norm": norm,
            "clip_factor": clip_factor,
            "finite": bool(sketch.isfinite().all()),
        }
        columns = {name: torch.tensor([value]) for name, value in row.items()}
        for name in ("learning_rate", "gradient_norm", "clip_factor"):
            columns[name] = torch.tensor([row[name]], dtype=torch.float64)
        writer.append(PER_STEP, {**columns, "sketch": sketch.unsqueeze(0)})
        return sketch / clip_factor

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _clipping(self) -> tuple[float, float]:
        """The gradient's norm before clipping, and the factor it was clipped by.

        The factor is measured on the parameter whose gradient is the largest.
        """
        if not self._norms:
            return 0.0, 1.0
        norms = torch.stack(list(self._norms.values())).to(torch.float64)
        largest = list(self._norms)[int(norms.argmax())]
        before = float(self._norms[largest])
        gradient = self._parameters[largest].grad
        total = float(norms.square().sum().sqrt())
        if gradient is None or before == 0.0:
            return total, 1.0
        return total, float(torch.linalg.vector_norm(gradient)) / before

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        """A hook that notes the norm of a parameter's gradient."""

        def note(parameter: Tensor) -> None:
            if self._recording and self._gradient_state.sync_gradients:
                assert parameter.grad is not None
                self._norms[name] = torch.linalg.vector_norm(parameter.grad)

        return note


def check_sum(total: Tensor, sketch: Tensor, low_precision: bool) -> None:
    """Raise unless the weighted sum of a step's rows is the step's own gradient."""
    distance = float(torch.linalg.vector_norm(total - sketch))
    norm = float(torch.linalg.vector_norm(sketch))
    tolerance = _LOW_PRECISION_SUM_TOLERANCE if low_precision else _SUM_TOLERANCE
    if distance > tolerance * norm:
        raise RuntimeError(
            "the per-example gradients must add up to the step's gradient within "
            f"{tolerance:g} of its norm, got {distance / norm:.3g}: some part of the "
            "model is not covered; pass per_example=False and report the model's class."
        )
