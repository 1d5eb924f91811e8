"""Products with the Hessian of a model's loss, and with its relatives."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.curvature.check import CurvatureCheck, check_products
from hf_sketch.curvature.double_backward import (
    DoubleBackwardError,
    Mode,
    choose_mode,
    curvature_setting,
    differentiated_again,
    obstacle_to_finite_differences,
)
from hf_sketch.curvature.finite_differences import central_difference, gradients_into
from hf_sketch.curvature.mean_loss import LossFunction, MeanLoss, Unit
from hf_sketch.curvature.vectors import Parts, Vector, norm_of
from hf_sketch.model.sketch import ModelSketch


class CurvatureOperator(ABC):
    """A symmetric map of a model's parameter space, known by its products.

    Shapes:
        operator @ vector  name -> parameter's shape, of every trainable parameter

    Args:
        model: the model; each product leaves it as it was.
        batches: inputs of the model, with labels; every product uses all of them.
        loss_fn: returns a batch's mean loss, a scalar, from (the model's output, its
            inputs); by default the model's own loss.
        mode: "autograd" differentiates the gradient (about 4 times its time, 2.6 times
            its memory); "finite_difference" takes the gradient at two near points (2
            times, 1.1 times; any attention kernel, float32 parameters); "auto" is
            autograd unless the model is compiled, quantized or runs Liger kernels.
        unit: the loss is the mean over all "tokens" with a label, or over "examples",
            each the mean over its own tokens. With a `loss_fn`, batches weigh as much
            as they have labels other than -100, or examples.

    Raises:
        ValueError: no batch, an unknown mode or unit, a model that the mode cannot
            differentiate, a loss that is no finite scalar.
        MemoryError: a single example does not fit; larger batches are halved.
    """

    check: CurvatureCheck | None = None
    """How well the first products agreed; None if they were not compared."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "auto",
        unit: Unit = "tokens",
    ) -> None:
        self.mode, self.mode_reason = choose_mode(model, mode)
        self.mean_loss = MeanLoss(model, batches, loss_fn, unit)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return self.mean_loss.parameters

    @abstractmethod
    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the product with a vector of parameter space."""

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """Return S @ H(S.T @ v): (out_size,) -> (out_size,)."""
        return model_sketch.sketch(self @ model_sketch.adjoint(vector))

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the mean loss."""
        with self._setting():
            return self._named(self.mean_loss.sum(self._gradient_of))

    def loss_and_sketched_gradient(
        self, model_sketch: ModelSketch
    ) -> tuple[float, Tensor]:
        """Return the mean loss and its gradient's sketch; never the whole gradient."""

        def sketch(inputs: Mapping[str, Any], share: float) -> Parts:
            total = model_sketch.sketch_sum()
            with gradients_into(total, self.parameters):
                _, loss = self.mean_loss.run(inputs)
                (share * loss).backward()
            return [share * loss.detach(), total.result().squeeze(0)]

        with self._setting():
            loss, gradient = self.mean_loss.sum(sketch)
        return float(loss), gradient

    def _setting(self) -> AbstractContextManager[None]:
        """Put the model into the state in which it is differentiated."""
        return curvature_setting(self.mean_loss.model, self.mode)

    def _gradient_of(self, inputs: Mapping[str, Any], share: float) -> Parts:
        """Return a batch's share of the gradient."""
        _, loss = self.mean_loss.run(inputs)
        return self._derivative(share * loss)

    def _derivative(self, y: Any, grad_outputs: Any = None, **options: Any) -> Any:
        """Differentiate with respect to the parameters; zero where there is no path."""
        parts = torch.autograd.grad(
            y,
            list(self.parameters.values()),
            grad_outputs,
            allow_unused=True,
            materialize_grads=True,
            **options,
        )
        return _apart(parts)

    def _vectors(self, vector: Vector) -> Parts:
        """Return a vector's parts in the order of the parameters.

        Raises:
            ValueError: the names or shapes are not those of the parameters.
        """
        parts: Parts = []
        for name, parameter in self.parameters.items():
            part = vector.get(name)
            if part is None or part.shape != parameter.shape:
                got = None if part is None else tuple(part.shape)
                raise ValueError(
                    f"The vector must have {name!r} with shape "
                    f"{tuple(parameter.shape)}, got {got}. Pass a part for every "
                    "trainable parameter, as ModelSketch.adjoint does."
                )
            parts.append(part.to(parameter))
        return parts

    def _named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, parts, strict=True))


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss.

    On first use, products along the gradient are compared: autograd with finite
    differences, and H with its transpose. `check` keeps both figures. This takes four
    more products and a gradient.

    Args:
        self_check: whether to compare; see `CurvatureOperator` for the other arguments.

    Raises:
        RuntimeError: on first use, the comparison fails.

    Reference:
        Pearlmutter 1994 (reverse over reverse); central differences with a step scaled
        by the norms of the vector and of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "auto",
        unit: Unit = "tokens",
        self_check: bool = True,
    ) -> None:
        super().__init__(model, batches, loss_fn, mode=mode, unit=unit)
        self._may_change_mode = mode == "auto"
        self._unchecked = self_check

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """Return the Hessian-vector product."""
        parts = self._vectors(vector)
        self._check_once()
        with self._setting():
            return self._named(self._product(parts))

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """Return S @ H(S.T @ v); finite differences stream over the parameters.

        They hold half a copy of the parameters and one gradient at a time, no vector.
        """
        self._check_once()
        if self.mode == "autograd":
            return super().sketched_product(model_sketch, vector)
        # The expectation of |S.T v|; S S.T is nearly a multiple of the identity.
        norm = (model_sketch.in_size / model_sketch.out_size) ** 0.5 * vector.norm()
        with self._setting():
            return central_difference(
                self.parameters,
                lambda: model_sketch.adjoint_parts(vector),
                float(norm),
                lambda: [self.loss_and_sketched_gradient(model_sketch)[1]],
            )[0]

    def _check_once(self) -> None:
        """Compare products on first use; find the mode that works."""
        if not self._unchecked:
            return
        gradient = list(self.gradient().values())
        with self._setting():
            self._product(gradient)  # may change the mode
            other = None
            if self.mode == "autograd":
                coarse = obstacle_to_finite_differences(self.mean_loss.model)
                other = self._difference if coarse is None else None
            self.check = check_products(self._product, other, gradient)
        self._unchecked = False

    def _product(self, vectors: Parts) -> Parts:
        """Return H v, by finite differences if autograd fails and "auto" allows."""
        if self.mode == "autograd":
            try:
                return self._differentiated_twice(vectors)
            except DoubleBackwardError as error:
                model = self.mean_loss.model
                if not self._may_change_mode or obstacle_to_finite_differences(model):
                    raise
                self.mode, self.mode_reason = "finite_difference", str(error)
                warnings.warn(f"Using finite differences: {error}", stacklevel=4)
        return self._difference(vectors)

    def _differentiated_twice(self, vectors: Parts) -> Parts:
        """Return H v as the derivative of the gradient along v."""

        def product(inputs: Mapping[str, Any], share: float) -> Parts:
            _, loss = self.mean_loss.run(inputs)
            gradient = self._derivative(share * loss, create_graph=True)
            with differentiated_again(gradient):
                pairs = zip(gradient, vectors, strict=True)
                curved = [(g, v) for g, v in pairs if g.requires_grad]
                if not curved:  # the loss is linear
                    return [torch.zeros_like(v) for v in vectors]
                return self._derivative(*map(list, zip(*curved, strict=True)))

        return self.mean_loss.sum(product)

    def _difference(self, vectors: Parts) -> Parts:
        """Return H v as the difference of two gradients."""
        return central_difference(
            self.parameters,
            lambda: self._named(vectors).items(),
            norm_of(vectors),
            lambda: self.mean_loss.sum(self._gradient_of),
        )


def hessian_vector_product(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    vector: Vector,
    loss_fn: LossFunction | None = None,
    *,
    mode: Mode = "auto",
    unit: Unit = "tokens",
) -> dict[str, Tensor]:
    """Return one product with the Hessian of a mean loss; see `HessianOperator`."""
    return HessianOperator(model, batches, loss_fn, mode=mode, unit=unit) @ vector


def _apart(parts: Sequence[Tensor]) -> Parts:
    """Give each derivative its own memory: those of p and q in p + q share it."""
    apart: Parts = []
    places: set[int] = set()
    for part in parts:
        own = part.contiguous()  # a sum's derivative has zero strides
        apart.append(own.clone() if own.data_ptr() in places else own)
        places.add(own.data_ptr())
    return apart
