"""Products with the Hessian of a model's loss, and with its relatives."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.curvature.check import CurvatureCheck, check_products
from hf_sketch.curvature.double_backward import (
    DoubleBackwardError,
    check_graph,
    choose_mode,
    curvature_setting,
    explained,
    obstacle_to_finite_differences,
)
from hf_sketch.curvature.finite_differences import central_difference, gradients_into
from hf_sketch.curvature.mean_loss import LossFunction, MeanLoss
from hf_sketch.model.sketch import ModelSketch

Vector = Mapping[str, Tensor]


class CurvatureOperator(ABC):
    """A symmetric map of a model's parameter space, known by its products.

    Shapes:
        operator @ vector  name -> parameter's shape, of every trainable parameter

    Args:
        model: the model, left as it was after each product.
        batches: inputs of the model, with labels; always the same ones are used.
        loss_fn: of (the model's output, its inputs), the batch's mean loss, a scalar;
            by default the model's own loss.
        mode: "autograd" differentiates the gradient (about 4 gradients of time, 2.6 of
            memory), "finite_difference" takes it at two near points (2 gradients of
            time, 1.1 of memory, any attention kernel, float32 parameters), "auto" the
            first unless the model is compiled, quantised or runs Liger kernels.
        unit: the loss is the mean over all "tokens" with a label, or over "examples",
            each with the mean of its own tokens. Of a `loss_fn`, batches are weighted
            by their labels other than -100, or by their examples.

    Raises:
        ValueError: no batch, an unknown mode or unit, a model that the mode cannot
            differentiate, a loss that is no scalar or not finite.
        MemoryError: a single example does not fit; larger batches are halved.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        loss_fn: LossFunction | None = None,
        *,
        mode: str = "auto",
        unit: str = "tokens",
    ) -> None:
        self.mode, self.mode_reason = choose_mode(model, mode)
        self.mean_loss = MeanLoss(model, batches, loss_fn, unit)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return self.mean_loss.parameters

    @abstractmethod
    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """The product with a vector of parameter space."""

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """S @ H(S.T @ v): (out_size,) -> (out_size,)."""
        return model_sketch.sketch(self @ model_sketch.adjoint(vector))

    def gradient(self) -> dict[str, Tensor]:
        """The gradient of the mean loss."""
        with self._setting():
            total = self.mean_loss.sum(self._gradient_of)
        return self._named(total)

    def loss_and_sketched_gradient(
        self, model_sketch: ModelSketch
    ) -> tuple[float, Tensor]:
        """The mean loss, and its gradient sketched one parameter at a time."""
        with self._setting():
            loss, sketch = self._sketched_gradient(model_sketch)
        return float(loss), sketch

    @contextmanager
    def _setting(self) -> Generator[None]:
        """The model's state while it is differentiated."""
        model = self.mean_loss.model
        with curvature_setting(model, self.mode), torch.enable_grad():
            yield

    def _gradient_of(self, inputs: Mapping[str, Any], share: float) -> list[Tensor]:
        """A batch's share of the gradient."""
        _, loss = self.mean_loss.run(inputs)
        return self._derivative(share * loss)

    def _sketched_gradient(self, model_sketch: ModelSketch) -> list[Tensor]:
        """The mean loss and its gradient's sketch, without the gradient itself."""

        def sketch(inputs: Mapping[str, Any], share: float) -> list[Tensor]:
            total = model_sketch.sketch_sum()
            with gradients_into(total, self.parameters):
                _, loss = self.mean_loss.run(inputs)
                (share * loss).backward()
            return [share * loss.detach(), total.result().squeeze(0)]

        return self.mean_loss.sum(sketch)

    def _derivative(self, y: Any, grad_outputs: Any = None, **options: Any) -> Any:
        """The derivative with respect to the parameters, zero where there is none."""
        parts = torch.autograd.grad(
            y,
            list(self.parameters.values()),
            grad_outputs,
            allow_unused=True,
            materialize_grads=True,
            **options,
        )
        return _apart(parts)

    def _vectors(self, vector: Vector) -> list[Tensor]:
        """A vector's parts in the order of the parameters.

        Raises:
            ValueError: the names or shapes are not those of the parameters.
        """
        parts: list[Tensor] = []
        for name, parameter in self.parameters.items():
            part = vector.get(name)
            if part is None or part.shape != parameter.shape:
                got = None if part is None else tuple(part.shape)
                raise ValueError(
                    f"the vector must have {name!r} with shape "
                    f"{tuple(parameter.shape)}, got {got}: pass a part for every "
                    "trainable parameter, as ModelSketch.adjoint gives."
                )
            parts.append(part.to(parameter))
        return parts

    def _named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, parts, strict=True))


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss.

    On first use its products are compared with each other along the gradient: those by
    autograd with those by finite differences, and H with its transpose. `check` keeps
    both figures. This takes four more products, and a gradient.

    Args:
        model: see `CurvatureOperator`, as for all else.
        batches: inputs of the model, with labels.
        loss_fn: the batch's mean loss, of (the model's output, its inputs).
        mode: "auto" | "autograd" | "finite_difference".
        unit: "tokens" | "examples".
        self_check: whether to compare.

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
        mode: str = "auto",
        unit: str = "tokens",
        self_check: bool = True,
    ) -> None:
        super().__init__(model, batches, loss_fn, mode=mode, unit=unit)
        self._may_change_mode = mode == "auto"
        self._unchecked = self_check
        self.check: CurvatureCheck | None = None

    def __matmul__(self, vector: Vector) -> dict[str, Tensor]:
        """The Hessian-vector product."""
        parts = self._vectors(vector)
        self._check_once()
        with self._setting():
            return self._named(self._product(parts))

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """S @ H(S.T @ v), with finite differences in one pass over the parameters.

        Those hold half a copy of the parameters and one gradient at a time, no vector.
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
                lambda: self._sketched_gradient(model_sketch)[1:],
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

    def _product(self, vectors: list[Tensor]) -> list[Tensor]:
        """H v in the present mode, or in the other if that fails and may be changed."""
        if self.mode == "autograd":
            try:
                return self._differentiated_twice(vectors)
            except DoubleBackwardError as error:
                model = self.mean_loss.model
                if not self._may_change_mode or obstacle_to_finite_differences(model):
                    raise
                self.mode, self.mode_reason = "finite_difference", str(error)
                warnings.warn(f"finite differences are used: {error}", stacklevel=4)
        return self._difference(vectors)

    def _differentiated_twice(self, vectors: list[Tensor]) -> list[Tensor]:
        """H v as the derivative of the gradient along v."""

        def product(inputs: Mapping[str, Any], share: float) -> list[Tensor]:
            _, loss = self.mean_loss.run(inputs)
            gradient = self._derivative(share * loss, create_graph=True)
            with explained():
                check_graph(gradient)
                pairs = [
                    (g, v)
                    for g, v in zip(gradient, vectors, strict=True)
                    if g.requires_grad
                ]
                if not pairs:  # the loss is linear
                    return [torch.zeros_like(v) for v in vectors]
                return self._derivative(*map(list, zip(*pairs, strict=True)))

        return self.mean_loss.sum(product)

    def _difference(self, vectors: list[Tensor]) -> list[Tensor]:
        """H v as the difference of two gradients."""
        norm = torch.stack([torch.linalg.vector_norm(v) for v in vectors]).norm()
        return central_difference(
            self.parameters,
            lambda: self._named(vectors).items(),
            float(norm),
            lambda: self.mean_loss.sum(self._gradient_of),
        )


def hessian_vector_product(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    vector: Vector,
    loss_fn: LossFunction | None = None,
    *,
    mode: str = "auto",
    unit: str = "tokens",
) -> dict[str, Tensor]:
    """One product of the Hessian of a model's mean loss; see `HessianOperator`."""
    return HessianOperator(model, batches, loss_fn, mode=mode, unit=unit) @ vector


def _apart(parts: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives in memory of their own: of p + q both have one and the same."""
    apart: list[Tensor] = []
    places: set[int] = set()
    for part in parts:
        own = part.contiguous()  # zero strides stand for equal elements
        apart.append(own.clone() if own.data_ptr() in places else own)
        places.add(own.data_ptr())
    return apart
