"""The implicit sketch: a gradient with respect to coordinates in the sketched space."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_sketch.model.sketch import ModelSketch


def implicit_sketch(
    loss_fn: Callable[[Callable[..., Any]], Tensor],
    model: nn.Module,
    model_sketch: ModelSketch,
) -> Tensor:
    """Sketch the gradient of a loss as d/d omega of L(theta0 + S.T omega) at 0.

    The chain rule makes this the sketch of the gradient, S dL/d theta, which
    `ModelSketch.sketch` computes without lifting anything; it is here to compare with.
    The lifted parameters take as much memory as the model.

    Shapes:
        returns (row_size,)

    Args:
        loss_fn: function that maps a callable standing for the model to the loss, e.g.
            `lambda model: model(**batch).loss`.
        model: the model at theta0; its parameters and their `.grad` stay as they are.
        model_sketch: S.

    Raises:
        ValueError: the sketch is of another model.

    Reference:
        Schioppa 2024, arXiv:2402.03994, eq. (4).
    """
    parameters = model_sketch.parameters_of(model)
    omega = torch.zeros(
        model_sketch.row_size,
        dtype=next(iter(parameters.values())).dtype,
        device=next(iter(parameters.values())).device,
        requires_grad=True,
    )
    lifted = _Lift.apply(omega, model_sketch)
    names = [name for name, _ in model_sketch.shapes]
    moved = {
        name: parameters[name].detach() + part
        for name, part in zip(names, lifted, strict=True)
    }

    def moved_model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, moved, args, kwargs)

    (gradient,) = torch.autograd.grad(loss_fn(moved_model), omega)
    return gradient


class _Lift(torch.autograd.Function):
    """S.T as a differentiable map to the parameters' shapes; its derivative is S."""

    @staticmethod
    def forward(ctx: Any, omega: Tensor, model_sketch: ModelSketch) -> Any:
        ctx.model_sketch = model_sketch
        return tuple(model_sketch.adjoint(omega).values())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        names = [name for name, _ in ctx.model_sketch.shapes]
        gradients = dict(zip(names, grad_outputs, strict=True))
        return ctx.model_sketch.sketch(gradients), None
