"""Positive semi-definite relatives of the Hessian."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sketch.curvature.double_backward import differentiated_again
from hf_sketch.curvature.finite_differences import central_difference
from hf_sketch.curvature.hessian import CurvatureOperator
from hf_sketch.curvature.vectors import Parts, Vector, dot, norm_of
from hf_sketch.examples.calls import field_of
from hf_sketch.model.sketch import ModelSketch


class GaussNewtonOperator(CurvatureOperator):
    """The generalized Gauss-Newton matrix J.T H_loss J of the mean loss.

    J is the derivative of the model's logits, H_loss the Hessian of the loss with
    respect to them. It is positive semi-definite where the loss is convex in the
    logits. See `CurvatureOperator` for the arguments; "finite_difference" takes J v as
    the difference of two forward passes.

    Raises:
        ValueError: the loss does not depend on the logits of the model's output.

    Reference:
        Schraudolph 2002, "Fast curvature matrix-vector products".
    """

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the Gauss-Newton-vector product."""
        parts = self._vectors(vector)

        def product(inputs: Mapping[str, Any], share: float) -> Parts:
            finite = self.mode == "finite_difference"
            along = self._difference(inputs, parts) if finite else None
            output, loss = self.mean_loss.run(inputs)
            logits = field_of(output, "logits", 1)
            if along is None:
                along = self._derivative_along(logits, parts)
            (slope,) = list[Tensor | None](
                torch.autograd.grad(
                    share * loss, logits, create_graph=True, allow_unused=True
                )
            )
            if slope is None:
                raise ValueError(
                    "The Gauss-Newton matrix needs a loss of the output's logits, but "
                    "this loss does not depend on them. Use HessianOperator."
                )
            curved = torch.zeros_like(logits)
            if slope.requires_grad:  # the loss is not linear in the logits
                (curved,) = torch.autograd.grad(
                    slope, logits, along, retain_graph=True, materialize_grads=True
                )
            return self._derivative(logits, curved)

        with self._setting():
            return self._named(self.mean_loss.sum(product))

    def _derivative_along(self, logits: Tensor, vectors: Parts) -> Tensor:
        """Return J v, as the derivative of J.T u with respect to u."""
        dual = torch.zeros_like(logits, requires_grad=True)
        pulled = self._derivative(logits, dual, create_graph=True)
        pairs = zip(pulled, vectors, strict=True)
        linear, along = zip(*[(g, v) for g, v in pairs if g.requires_grad], strict=True)
        with differentiated_again(linear):
            return torch.autograd.grad(linear, dual, along)[0]

    def _difference(self, inputs: Mapping[str, Any], vectors: Parts) -> Tensor:
        """Return J v, as the difference of two forward passes."""
        with torch.no_grad():
            (along,) = central_difference(
                self.parameters,
                lambda: self._named(vectors).items(),
                norm_of(vectors),
                lambda: [field_of(self.mean_loss.run(inputs)[0], "logits", 1)],
            )
        return along


class EmpiricalFisherOperator(CurvatureOperator):
    """The empirical Fisher matrix: the mean over examples of g g.T.

    g is the gradient of an example's own loss, the mean over its tokens. Products in
    sketch space use the examples' sketched gradients, which are computed once and kept
    until a parameter changes: (examples, out_size) numbers. See `CurvatureOperator` for
    the arguments; `mode` and `unit` have no effect.
    """

    _kept: tuple[ModelSketch, list[int], Tensor] | None = None

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the Fisher-vector product, one example after the other."""
        parts = self._vectors(vector)
        total: Parts = [torch.zeros_like(part) for part in parts]
        count = 0
        with self._setting():
            for inputs in self.mean_loss.examples():
                gradient = self._gradient_of(inputs, 1.0)
                slope = dot(gradient, parts)
                for held, part in zip(total, gradient, strict=True):
                    held.add_(part, alpha=slope)
                count += 1
        return self._named([held.div_(count) for held in total])

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """Return S @ F(S.T @ v), exactly: the mean of (S g) (S g).v."""
        versions = [p._version for p in self.parameters.values()]
        if self._kept is None or self._kept[:2] != (model_sketch, versions):
            with self._setting():
                sketches = [
                    model_sketch.sketch(self._named(self._gradient_of(inputs, 1.0)))
                    for inputs in self.mean_loss.examples()
                ]
            self._kept = model_sketch, versions, torch.stack(sketches)
        rows = self._kept[2]
        return rows.T @ (rows @ vector) / len(rows)
