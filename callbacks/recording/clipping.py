"""By which factor training has multiplied its gradients before a callback sees them."""

from collections.abc import Iterable, Mapping

import torch
from accelerate.state import PartialState
from torch import Tensor

from hf_sketch.model.fsdp import in_row_shards, own_part
from hf_sketch.processes import reduced
from hf_sketch.sketches.operator import accumulation_dtype

_WITNESSES = 2**18
ROUNDING = 1e-6  # gradients may be scaled and scaled back before the optimizer steps


class ClipProbe:
    """Compares gradients with what the backward passes of the step left of them.

    The row of a step is the gradient that the optimizer sees; the rows of its examples
    add up to the gradient before clipping. Scores need the factor between the two, and
    the Trainer gives it to nobody: it clips before `on_pre_optimizer_step`, where no
    callback is called, and the norm goes to the log alone, rounded by other code (FSDP,
    a GradScaler that undoes its scale in the same call, callbacks that change
    gradients). So some elements of each parameter's gradient, the witnesses, are kept
    when a backward pass has run, and the norm of the same elements is compared when the
    optimizer is about to step. DDP has averaged the gradients by then; where parameters
    are in shards (FSDP2), processes add up squared norms.

    Args:
        parameters: what is trained, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.in_shards = in_row_shards(parameters.values())
        self._each = witnesses_each(len(parameters))
        self._witnesses: Tensor | None = None

    def note(self) -> None:
        """Keep the witnesses as the backward pass that has just run left them."""
        self._witnesses = self._present()

    def factor(self) -> Tensor:
        """Return what gradients were multiplied by since the last `note`, or 0.

        All processes must call together.
        """
        before, self._witnesses = self._witnesses, None
        assert before is not None
        norm = norm_of([before], self.in_shards)
        factor = norm_of([self._present()], self.in_shards) / norm
        unchanged = (norm == 0) | ((factor - 1).abs() < ROUNDING)
        return torch.where(unchanged, 1.0, factor)

    def _present(self) -> Tensor:
        """The witnesses of all parameters end to end, zeros where there is none."""
        parts = [
            torch.zeros_like(self._witness(parameter.detach()))
            if parameter.grad is None
            else self._witness(parameter.grad)
            for parameter in self.parameters.values()
        ]
        return torch.cat(parts)

    def _witness(self, gradient: Tensor) -> Tensor:
        """Some elements of a parameter's gradient, or of a shard, always the same."""
        part, _ = own_part(gradient)
        return part[: self._each].to(accumulation_dtype(part.dtype))


def witnesses_each(parameters: int) -> int:
    """Return the largest number of witnesses per parameter, given their number."""
    return max(1, _WITNESSES // parameters)


def norm_of(parts: Iterable[Tensor], in_shards: bool) -> Tensor:
    """Return the norm of a vector that is given in parts, with those of all shards."""
    norms = [
        torch.linalg.vector_norm(part, dtype=accumulation_dtype(part.dtype))
        for part in parts
    ]
    none = torch.zeros((), device=PartialState().device)
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else none
    return reduced(norm**2, "sum").sqrt() if in_shards else norm
