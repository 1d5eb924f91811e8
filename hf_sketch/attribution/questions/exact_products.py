"""Inner products of whole gradients, for a few examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_sketch.examples.own_loss import own_part
from hf_sketch.examples.sketcher import ExampleLossFunction
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.operator import accumulation_dtype

_ELEMENTS_AT_ONCE = 2**16  # in float32, before float64 takes over


@dataclass(frozen=True, eq=False)
class ExactGradients:
    """Gradients of single examples' own losses, by a backward pass for each.

    Args:
        model: the model, in evaluation mode.
        model_sketch: names the parameters, and may have a normalizer.
        collate: makes the model's inputs of a list of examples.
        loss_fn: see `sketch_dataset`.
    """

    model: nn.Module
    model_sketch: ModelSketch
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]
    loss_fn: ExampleLossFunction | None = None

    def of(self, example: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return an example's gradient by parameter."""
        parameters = self.model_sketch.parameters_of(self.model)
        device = next(iter(parameters.values())).device
        inputs = send_to_device(dict(self.collate([example])), device)
        with torch.enable_grad():
            output = self.model(**inputs)
            if self.loss_fn is None:
                loss = own_part(self.model, output, penalised=False)
            else:
                loss = self.loss_fn(output, inputs).sum()
        found = torch.autograd.grad(
            loss, [*parameters.values()], allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, found, strict=True))

    def held(self, gradients: Sequence[Mapping[str, Tensor]]) -> "HeldGradients":
        """Return gradients in a form that is multiplied with others."""
        rows = [self._scaled(gradient) for gradient in gradients]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return HeldGradients(stacked)

    def products(
        self, held: "HeldGradients", gradient: Mapping[str, Tensor]
    ) -> tuple[Tensor, float]:
        """Return inner products with gradients that are held, and the own norm.

        Shapes:
            the products (held,), float64, on the CPU
        """
        own = self.held([gradient])
        scaled = {name: row[0] for name, row in own.stacked.items()}
        return held.times(scaled), float(own.times(scaled).sqrt())

    def _scaled(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flatten a gradient, divided by the normalizer's roots if there is one."""
        flat = {name: x.flatten() for name, x in gradient.items()}
        normalizer = self.model_sketch.normalizer
        if normalizer is None:
            return flat
        return {
            name: x * normalizer.elements(name, 0, len(x), x)
            for name, x in flat.items()
        }


@dataclass(frozen=True, eq=False)
class HeldGradients:
    """Gradients of several examples, name -> (examples, elements)."""

    stacked: dict[str, Tensor]

    def norms(self) -> Tensor:
        """Return the norm of each, (examples,), float64, on the CPU."""
        count = len(next(iter(self.stacked.values())))
        rows = [{n: x[i] for n, x in self.stacked.items()} for i in range(count)]
        return torch.stack([self.times(r)[i] for i, r in enumerate(rows)]).sqrt()

    def times(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each with a gradient, (examples,), float64."""
        total = torch.zeros(len(next(iter(self.stacked.values()))), dtype=torch.float64)
        for name, rows in self.stacked.items():
            parts = rows.split(_ELEMENTS_AT_ONCE, dim=1)
            for part, other in zip(
                parts, gradient[name].split(_ELEMENTS_AT_ONCE), strict=True
            ):
                dtype = accumulation_dtype(part.dtype)
                total += (part.to(dtype) @ other.to(dtype)).double().cpu()
        return total
