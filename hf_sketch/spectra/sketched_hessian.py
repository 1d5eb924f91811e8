"""Curvature as an operator on the sketched space."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.curvature.hessian import CurvatureOperator
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.operator import accumulation_dtype


@dataclass(frozen=True)
class SketchedHessian:
    """A curvature operator between a sketch and its transpose: v -> S @ H(S.T @ v).

    Its largest eigenvalues are near those of H, shifted by about tr(H) / out_size; see
    `Spectrum`.

    Shapes:
        operator @ v  (out_size,) -> (out_size,)

    Args:
        curvature: H; a HessianOperator, GaussNewtonOperator or EmpiricalFisherOperator.
        model_sketch: S, of the same model.

    Raises:
        ValueError: the sketch is of another model, or has groups of layers.

    Reference:
        Schioppa 2024, arXiv:2402.03994, C.1 and B.2 (explicit).
    """

    curvature: CurvatureOperator
    model_sketch: ModelSketch

    def __post_init__(self) -> None:
        self.model_sketch.parameters_of(self.curvature.mean_loss.model)
        if self.model_sketch.groups:
            raise ValueError(
                "a spectrum needs one sketch of all layers, got groups of layers: pass "
                "ModelSketch.from_model(model, ...) without groups."
            )

    @property
    def size(self) -> int:
        """The length of the vectors: the sketch's out_size."""
        return self.model_sketch.out_size

    @property
    def dtype(self) -> torch.dtype:
        """The vectors' dtype: float32, or float64 for a float64 model."""
        return accumulation_dtype(self._parameter.dtype)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._parameter.device

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return self.curvature.sketched_product(self.model_sketch, v).to(self.dtype)

    @property
    def _parameter(self) -> Tensor:
        return next(iter(self.curvature.parameters.values()))
