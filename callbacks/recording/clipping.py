"""By which factor training has multiplied its gradients before a callback sees them."""

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate.state import PartialState
from torch import Tensor

from hf_sketch.model.fsdp import in_row_shards, own_part
from hf_sketch.processes import reduced
from hf_sketch.sketches import SRHT, Sketch
from hf_sketch.sketches.operator import accumulation_dtype, next_power_of_two

_WITNESSES = 2**18
_EXCHANGED = 2**10
_ROUNDING = 1e-6  # processes may add up gradients and witnesses in different orders


class ClipProbe:
    """Compares gradients with what the backward passes of the step left of them.

    The row of a step is the gradient that the optimizer sees; the rows of its examples
    add up to the gradient before clipping. Scores need the factor between the two, and
    the Trainer gives it to nobody: it clips before `on_pre_optimizer_step`, where no
    callback is called, and the norm goes to the log alone, rounded by other code (FSDP,
    a GradScaler that undoes its scale in the same call, callbacks that change
    gradients). So hooks keep some elements of each parameter's gradient, the witnesses,
    as each backward pass leaves them, and the norm of the same elements is compared
    when the optimizer is about to step.

    Witnesses are kept before DDP averages gradients. Several processes average theirs
    as well, but of a sketch of them, which is multiplied by as much. Where parameters
    are in shards (FSDP2), the hooks see averaged shards, and processes add up squared
    norms.

    Args:
        parameters: what is trained, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.in_shards = in_row_shards(parameters.values())
        self._recording = False
        self._each = max(1, _WITNESSES // len(parameters))
        self._exchanged: Sketch | None = None
        if PartialState().num_processes > 1 and not self.in_shards:
            size = sum(min(self._each, p.numel()) for p in parameters.values())
            shorter = min(size, _EXCHANGED)
            self._exchanged = SRHT(size, shorter, 0, next_power_of_two(shorter))
        self._witnesses: dict[str, Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in parameters.items()
        ]

    def start_step(self, recording: bool) -> None:
        """Begin an optimizer step, whose gradients are watched or not."""
        self._recording = recording
        self._witnesses = {}

    def factor(self) -> Tensor:
        """Return what gradients were multiplied by since the backward passes, or 0.

        All processes must call together.
        """
        parts = {
            name: self._witness(own_part(parameter.grad)[0])
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }
        before, now = self._laid_out(self._witnesses), self._laid_out(parts)
        if self._exchanged is not None:
            before = reduced(self._exchanged @ before, "mean")
            now = self._exchanged @ now
        norm = norm_of([before], self.in_shards)
        factor = norm_of([now], self.in_shards) / norm
        unchanged = (norm == 0) | ((factor - 1).abs() < _ROUNDING)
        return torch.where(unchanged, 1.0, factor)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._witnesses = {}

    def _laid_out(self, witnesses: Mapping[str, Tensor]) -> Tensor:
        """The witnesses of all parameters end to end, zeros where there are none."""
        parts = [
            witnesses[name]
            if name in witnesses
            else torch.zeros_like(self._witness(own_part(parameter.detach())[0]))
            for name, parameter in self.parameters.items()
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


def norm_of(parts: Iterable[Tensor], in_shards: bool) -> Tensor:
    """Return the norm of a vector that is given in parts, with those of all shards."""
    norms = [
        torch.linalg.vector_norm(part, dtype=accumulation_dtype(part.dtype))
        for part in parts
    ]
    none = torch.zeros((), device=PartialState().device)
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else none
    return reduced(norm**2, "sum").sqrt() if in_shards else norm
