"""Rows of the store with each step's gradient."""

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from hf_sketch.model.fsdp import in_row_shards, own_part
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.processes import reduced
from hf_sketch.sketches import SRHT, Sketch
from hf_sketch.sketches.operator import accumulation_dtype, next_power_of_two
from hf_sketch.store.rows import PER_STEP, row_columns

from .position import Position
from .sink import HeldRows

_SUM_TOLERANCE = 1e-3
_LOW_PRECISION_SUM_TOLERANCE = 5e-2
_WITNESSES = 2**18
_EXCHANGED = 2**10
_ROUNDING = 1e-6  # processes may add up gradients and witnesses in different orders


class StepRecorder:
    """Writes a row for each optimizer step: the gradient that the optimizer sees.

    The Trainer clips before any callback hears of the step. What it multiplied by is
    told by witnesses, some elements of each parameter's gradient, which hooks keep as
    each backward pass leaves them. Several processes average theirs, as they do all
    gradients, but of a sketch of them, which is multiplied by as much; or, if the
    parameters are in shards (FSDP2), each sketches its own and the sketches add up. The
    first process writes.

    Args:
        model: the model that trains.
        model_sketch: the map.

    Raises:
        ValueError: the parameters are in shards, and the layout is "flat".
    """

    def __init__(self, model: nn.Module, model_sketch: ModelSketch) -> None:
        self._model_sketch = model_sketch
        self._parameters = model_sketch.parameters_of(model)
        self._in_shards = in_row_shards(self._parameters.values())
        if self._in_shards and model_sketch.layout == "flat":
            raise ValueError(
                "layout='flat' needs the whole gradient in one place, got parameters "
                "in shards: pass 'factored' or 'blocked'."
            )
        self._each = max(1, _WITNESSES // len(self._parameters))
        self._exchanged: Sketch | None = None
        if PartialState().num_processes > 1 and not self._in_shards:
            sizes = (min(self._each, p.numel()) for p in self._parameters.values())
            size = sum(sizes)
            shorter = min(size, _EXCHANGED)
            self._exchanged = SRHT(size, shorter, 0, next_power_of_two(shorter))
        self._recording = False
        self._witnesses: dict[str, Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self._parameters.items()
        ]

    def start_step(self, recording: bool) -> None:
        """An optimizer step begins."""
        self._recording = recording
        self._witnesses = {}

    def end_step(
        self, moment: Position, rows: HeldRows, loss_scale: float
    ) -> Tensor | None:
        """The optimizer is about to step: write the row. All processes call it.

        Args:
            moment: the step.
            rows: where it goes.
            loss_scale: of a GradScaler; the Trainer undoes it where it clips.

        Returns:
            the sketch of the step's gradient before clipping, (out_size,), if recorded.
        """
        if not self._recording:
            return None
        gradients = {
            n: p.grad for n, p in self._parameters.items() if p.grad is not None
        }
        parts = {name: own_part(gradient)[0] for name, gradient in gradients.items()}
        factor = self._factor(parts)
        # Near 1 before the scale is undone, near 1 / loss_scale after.
        divisor = factor.where(factor != 0, 1.0)
        scaled = divisor.log().abs() < (divisor * loss_scale).log().abs()
        clip_factor = torch.where(scaled, factor, factor * loss_scale)
        sketch = self._sketch(gradients, factor)
        sketch = sketch / torch.where(scaled, loss_scale, 1.0)
        norm = self._norm(parts.values())
        columns = row_columns(
            sketch.unsqueeze(0),
            epoch=moment.epoch,
            step=moment.step,
            learning_rate=float(moment.learning_rate),
            gradient_norm=(norm / divisor / loss_scale).reshape(1),
            clip_factor=clip_factor.reshape(1),
        )
        if PartialState().is_main_process:
            rows.append(PER_STEP, columns)
        return sketch / clip_factor

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _factor(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What the gradients were multiplied by since the backward pass, if not 0."""
        before = self._laid_out(self._witnesses)
        now = self._laid_out({n: self._witness(part) for n, part in parts.items()})
        if self._exchanged is not None:
            before = reduced(self._exchanged @ before, "mean")
            now = self._exchanged @ now
        norm = self._norm([before])
        factor = self._norm([now]) / norm
        unchanged = (norm == 0) | ((factor - 1).abs() < _ROUNDING)
        return torch.where(unchanged, 1.0, factor)

    def _sketch(self, gradients: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The sketch of the whole gradient, of the type and at the place of `like`."""
        if not self._in_shards:
            return self._model_sketch.sketch(gradients)
        parts = {name: own_part(gradient) for name, gradient in gradients.items()}
        return reduced(self._model_sketch.sketch_parts(parts).to(like), "sum")

    def _norm(self, parts: Iterable[Tensor]) -> Tensor:
        """The norm of a vector that is given in parts, with those of all shards."""
        norms = [
            torch.linalg.vector_norm(part, dtype=accumulation_dtype(part.dtype))
            for part in parts
        ]
        none = torch.zeros((), device=PartialState().device)
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else none
        return reduced(norm**2, "sum").sqrt() if self._in_shards else norm

    def _laid_out(self, witnesses: Mapping[str, Tensor]) -> Tensor:
        """The witnesses of all parameters end to end, zeros where there are none."""
        parts = [
            witnesses[name]
            if name in witnesses
            else torch.zeros_like(self._witness(own_part(parameter.detach())[0]))
            for name, parameter in self._parameters.items()
        ]
        return torch.cat(parts)

    def _witness(self, gradient: Tensor) -> Tensor:
        """Some elements of a parameter's gradient, or of a shard, always the same."""
        return gradient[: self._each].to(accumulation_dtype(gradient.dtype))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        """A hook that keeps the witness of a parameter."""

        def keep(parameter: Tensor) -> None:
            if self._recording:
                assert parameter.grad is not None
                part, _ = own_part(parameter.grad)
                self._witnesses[name] = self._witness(part).clone()

        return keep


def check_sum(total: Tensor, sketch: Tensor, low_precision: bool) -> None:
    """Raise unless the weighted sum of a step's rows is the step's own gradient.

    In several processes, `total` is the sum over them all.
    """
    distance = float(torch.linalg.vector_norm(total - sketch))
    norm = float(torch.linalg.vector_norm(sketch))
    tolerance = _LOW_PRECISION_SUM_TOLERANCE if low_precision else _SUM_TOLERANCE
    if distance > tolerance * norm:
        raise RuntimeError(
            "the per-example gradients must add up to the step's gradient within "
            f"{tolerance:g} of its norm, got {distance / norm:.3g}: some part of the "
            "model is not covered; pass per_example=False and report the model's class."
        )
