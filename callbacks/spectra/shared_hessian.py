"""The Hessian of a loss over batches that several processes share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from hf_sketch.curvature.check import CurvatureCheck
from hf_sketch.curvature.hessian import CurvatureOperator, HessianOperator
from hf_sketch.curvature.mean_loss import check_items
from hf_sketch.curvature.vectors import Vector
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.processes import check_others, gathered, of_first, reduced
from hf_sketch.sketches.operator import accumulation_dtype

Batch = Mapping[str, Any]


class SharedHessian(CurvatureOperator):
    """The Hessian of the mean loss over the batches of all processes.

    Each multiplies with its own batches, on the bare model, so that DDP's hooks do
    nothing. One all-reduce of the product, of `out_size` numbers if sketched, adds them
    up, weighted by tokens or examples. All processes make the same calls in the same
    order, inside `Together`.

    Args:
        own: the Hessian over this process's batches.
        idle: whether these belong to another process, and count for nothing here.

    Raises:
        ValueError: on first use, no token of any process has a label.
        OtherProcessFailedError: another process failed.
    """

    def __init__(self, own: HessianOperator, idle: bool) -> None:
        self.own = own
        self.mode, self.mode_reason = own.mode, own.mode_reason
        self.mean_loss = own.mean_loss
        self._idle = idle
        self._share: float | None = None

    @property
    def check(self) -> CurvatureCheck | None:
        return self.own.check

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the Hessian-vector product."""
        return self._mean(lambda: self.own @ vector, self.parameters)

    def gradient(self) -> dict[str, Tensor]:
        return self._mean(self.own.gradient, self.parameters)

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        def own() -> dict[str, Tensor]:
            return {"": self.own.sketched_product(model_sketch, vector)}

        return self._mean(own, {"": vector})[""]

    def loss_and_sketched_gradient(
        self, model_sketch: ModelSketch
    ) -> tuple[float, Tensor]:
        def own() -> dict[str, Tensor]:
            loss, gradient = self.own.loss_and_sketched_gradient(model_sketch)
            return {"": torch.cat([gradient, gradient.new_tensor([loss])])}

        like = next(iter(self.parameters.values())).new_empty(model_sketch.out_size + 1)
        total = self._mean(own, {"": like})[""]
        return float(total[-1]), total[:-1]

    def _mean(
        self, own: Callable[[], dict[str, Tensor]], like: Vector
    ) -> dict[str, Tensor]:
        """Return the processes' weighted mean; an idle one adds zeros."""
        share = self._own_share()
        if share:
            parts = own()
            self.mode, self.mode_reason = self.own.mode, self.own.mode_reason
        else:
            parts = {name: torch.zeros_like(part) for name, part in like.items()}
        check_others()
        return {
            name: reduced(share * part.to(accumulation_dtype(part.dtype)), "sum")
            for name, part in parts.items()
        }

    def _own_share(self) -> float:
        """Return the part of all tokens or examples that is in the own batches."""
        if self._share is None:
            items = 0 if self._idle else self.mean_loss.items
            check_others()
            total = sum(gathered(items))
            check_items(total)
            self._share = items / total
        return self._share


def own_batches(
    batches: Sequence[Batch] | None, device: torch.device
) -> tuple[list[Batch], bool]:
    """Return this process's share of the first one's batches; all call together.

    Returns:
        the batches, on the device; the first one and True if there are too few for all.
    """
    all_batches = of_first(batches)
    assert all_batches is not None
    processes = PartialState()
    own = all_batches[processes.process_index :: processes.num_processes]
    idle = not own
    return [send_to_device(b, device) for b in own or all_batches[:1]], idle
