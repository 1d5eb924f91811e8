"""The Hessian of a loss over batches that several processes share."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from hf_sketch.curvature.hessian import CurvatureOperator, HessianOperator
from hf_sketch.curvature.mean_loss import check_items
from hf_sketch.curvature.vectors import Parts, Vector
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

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the Hessian-vector product."""
        return self._mean_of_parameters(lambda: self.own @ vector)

    def gradient(self) -> dict[str, Tensor]:
        return self._mean_of_parameters(self.own.gradient)

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        (product,) = self._mean(
            lambda: [self.own.sketched_product(model_sketch, vector)], [vector]
        )
        return product

    def loss_and_sketched_gradient(
        self, model_sketch: ModelSketch
    ) -> tuple[float, Tensor]:
        def own() -> Parts:
            loss, gradient = self.own.loss_and_sketched_gradient(model_sketch)
            return [torch.cat([gradient, gradient.new_tensor([loss])])]

        like = next(iter(self.parameters.values())).new_empty(model_sketch.out_size + 1)
        (total,) = self._mean(own, [like])
        return float(total[-1]), total[:-1]

    def _mean_of_parameters(
        self, own: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        like = list(self.parameters.values())
        return self._named(self._mean(lambda: list(own().values()), like))

    def _mean(self, own: Callable[[], Parts], like: Sequence[Tensor]) -> Parts:
        """Return the processes' weighted mean; an idle one adds zeros."""
        if self._share:
            parts = own()
            self.mode, self.mode_reason = self.own.mode, self.own.mode_reason
            self.check = self.own.check
        else:
            parts = [torch.zeros_like(part) for part in like]
        check_others()
        return [
            reduced(self._share * part.to(accumulation_dtype(part.dtype)), "sum")
            for part in parts
        ]

    @cached_property
    def _share(self) -> float:
        """The part of all tokens or examples that is in the own batches."""
        items = 0 if self._idle else self.mean_loss.items
        check_others()
        total = sum(gathered(items))
        check_items(total)
        return items / total


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
