"""The row of a step: the gradient that the optimizer sees."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_sketch.examples.batch import ExampleBatch
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_row_shards, own_part
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.processes import reduced
from hf_sketch.sketches.multi_tensor.given import DTYPES
from hf_sketch.store.rows import row_columns

from .clipping import ROUNDING, ClipProbe, norm_of, witnesses_each

_SUM_TOLERANCE = 1e-3
_LOW_PRECISION_SUM_TOLERANCE = 5e-2


class StepReader(ABC):
    """What reads the gradients of steps."""

    def start_step(self) -> None:  # noqa: B027
        """Begin an optimizer step."""

    def watched(self, sketcher: ExampleSketcher | None) -> AbstractContextManager[None]:
        """Return what holds hooks for a micro-batch, which `sketcher` reads, too."""
        return nullcontext()

    def note(self) -> None:  # noqa: B027
        """Look at the gradients as the backward pass that has just run left them."""

    @abstractmethod
    def columns(
        self, position: Mapping[str, float], loss_scale: float
    ) -> dict[str, Tensor]:
        """Return the columns of the step's row; all processes must call together."""


class LeftGradients(StepReader):
    """Reads the gradients that are left when the optimizer is about to step.

    Args:
        model_sketch: the map.
        parameters: what is trained, by name.

    Raises:
        ValueError: parameters are in shards that the layout cannot sketch one by one.
    """

    def __init__(
        self, model_sketch: ModelSketch, parameters: Mapping[str, Tensor]
    ) -> None:
        self._model_sketch, self._probe = model_sketch, ClipProbe(parameters)
        check_layout_of_shards(model_sketch, self._probe.in_shards)

    def note(self) -> None:
        self._probe.note()

    def columns(
        self, position: Mapping[str, float], loss_scale: float
    ) -> dict[str, Tensor]:
        return step_columns(self._model_sketch, self._probe, position, loss_scale)


class GradientsAtOnce(StepReader):
    """Reads the gradients that are left, in five launches for all of them.

    Args:
        model_sketch: a map that kernels compute.
        parameters: what is trained, by name, on one device; whole, or in row shards.
    """

    def __init__(
        self, model_sketch: ModelSketch, parameters: Mapping[str, Tensor]
    ) -> None:
        self._parameters = [parameters[name] for name, _ in model_sketch.shapes]
        parts: dict[str, range] = {}
        for name, parameter in parameters.items():
            part, start = own_part(parameter.detach())
            parts[name] = range(start, start + len(part))
        settings = witnesses_each(len(parameters)), ROUNDING, parts
        join = partial(reduced, how="sum") if in_row_shards(self._parameters) else None
        device = self._parameters[0].device
        self._pass = model_sketch.whole_gradients.begin(device, *settings, join)

    def note(self) -> None:
        self._pass.note(self._gradients())

    def columns(
        self, position: Mapping[str, float], loss_scale: float
    ) -> dict[str, Tensor]:
        found = self._pass.finish(self._gradients(), loss_scale)
        return row_columns(
            found.row.unsqueeze(0),
            **position,
            gradient_norm=found.norm,
            clip_factor=found.clip_factor,
            finite=found.finite,
        )

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients, those of sparse embeddings with their zeros.

        Of shards, what this process answers for.
        """
        found = [parameter.grad for parameter in self._parameters]
        return [
            None if x is None else own_part(x.to_dense() if x.is_sparse else x)[0]
            for x in found
        ]


def left_gradients(
    model_sketch: ModelSketch, parameters: Mapping[str, Tensor]
) -> StepReader:
    """Return what reads the gradients that are left, at once where kernels do it."""
    given = [(parameters[name], shape) for name, shape in model_sketch.shapes]
    devices = {parameter.device for parameter, _ in given}
    plain = all(type(x) in (Tensor, nn.Parameter) for x, _ in given)
    at_once = (
        len(devices) == 1
        and model_sketch.whole_gradients.can_read(devices.pop())
        # In shards of other kinds, a tensor is of another type, or of another shape.
        and (plain or in_row_shards(x for x, _ in given))
        and all(tuple(x.shape) == shape and x.dtype in DTYPES for x, shape in given)
    )
    reader = GradientsAtOnce if at_once else LeftGradients
    return reader(model_sketch, parameters)


def check_layout_of_shards(model_sketch: ModelSketch, split: bool) -> None:
    """Raise if parameters are in shards that the layout cannot sketch one by one."""
    if model_sketch.layout == "flat" and split:
        raise ValueError(
            "layout='flat' needs the whole gradient in one place, but FSDP has split "
            "the parameters. Pass layout='grouped' or 'blocked'."
        )


def step_columns(
    model_sketch: ModelSketch,
    probe: ClipProbe,
    position: Mapping[str, float],
    loss_scale: float,
) -> dict[str, Tensor]:
    """Return the columns of a step's row; all processes must call together.

    `loss_scale` is a GradScaler's, which the Trainer undoes where it clips.
    """
    factor = probe.factor()
    gradients = {n: p.grad for n, p in probe.parameters.items() if p.grad is not None}
    # Near 1 before the scale is undone, near 1 / loss_scale after.
    divisor = factor.where(factor != 0, 1.0)
    scaled = divisor.log().abs() < (divisor * loss_scale).log().abs()
    clip_factor = torch.where(scaled, factor, factor * loss_scale)
    parts = {name: own_part(gradient) for name, gradient in gradients.items()}
    if probe.in_shards:
        sketch = reduced(model_sketch.sketch_parts(parts).to(factor), "sum")
    else:
        sketch = model_sketch.sketch(gradients)
    sketch = sketch / torch.where(scaled, loss_scale, 1.0)
    norm = norm_of((part for part, _ in parts.values()), probe.in_shards)
    return row_columns(
        sketch.unsqueeze(0),
        **position,
        gradient_norm=(norm / divisor / loss_scale).reshape(1),
        clip_factor=clip_factor.reshape(1),
    )


class SumCheck:
    """Compares a step's row with the weighted sum of its examples' rows, once.

    Args:
        needed: whether rows of both kinds are recorded.
        low_precision: whether training computes in 16 bits.
    """

    def __init__(self, needed: bool, low_precision: bool) -> None:
        self.done, self._low_precision = not needed, low_precision
        self._total: Tensor | None = None
        self._complete = True  # whether the sum is the step's gradient

    def start_step(self) -> None:
        """Begin an optimizer step."""
        self._total = None

    def add(self, batch: ExampleBatch) -> None:
        """Add the rows of a micro-batch's examples."""
        if not self.done:
            self._complete = self._complete and batch.complete
            weighted = batch.weights.to(batch.rows) @ batch.rows
            self._total = weighted if self._total is None else self._total + weighted

    def join(self) -> None:
        """Add what other processes have; all of them must call together."""
        if self._total is not None and not self.done:
            self._total = reduced(self._total, "sum")

    def check(self, row: Mapping[str, Tensor]) -> float | None:
        """Compare with the step's row; see `check_sum`. None if there is no sum."""
        if self.done or self._total is None:
            return None
        share = check_sum(self._total, row, self._low_precision, self._complete)
        self.done = bool(self._total.any())  # and not a step without labels
        return share


def check_sum(
    total: Tensor, row: Mapping[str, Tensor], low_precision: bool, complete: bool
) -> float:
    """Raise unless `total`, of all processes' rows, is the step's own gradient.

    Where the loss may have a term that no example owns, a difference is a warning.

    Returns:
        the norm of that term's gradient, divided by that of the step's.
    """
    sketch = row["sketch"][0] / row["clip_factor"]
    distance = float(torch.linalg.vector_norm(total - sketch))
    norm = float(torch.linalg.vector_norm(sketch))
    tolerance = _LOW_PRECISION_SUM_TOLERANCE if low_precision else _SUM_TOLERANCE
    if distance <= tolerance * norm:
        return 0.0
    share = distance / norm if norm > 0 else math.inf
    if not complete:
        warnings.warn(
            f"A part of the first recorded step's gradient, {share:.2g} of "
            "its norm, belongs to no example: that of a penalty, or of a router's "
            "balancing loss. The rows of examples do not hold it, those of steps do.",
            stacklevel=2,
        )
        return share
    raise RuntimeError(
        "The per-example gradients do not add up to the step's gradient: they are "
        f"off by {share:.3g} of its norm, more than {tolerance:g}. Some "
        "part of the model is not covered. Pass per_example=False and report the "
        "model's class."
    )


def computes_in_16_bits(args: TrainingArguments, model: nn.Module) -> bool:
    """Return whether training, or some parameter, has fewer than 32 bits."""
    short = any(p.element_size() < 4 for p in model.parameters())
    return args.bf16 or args.fp16 or short
