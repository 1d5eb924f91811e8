"""The check that a Hessian operator makes of its first product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_sketch.curvature.vectors import Parts, dot, norm_of

Product = Callable[[Parts], Parts]
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 5e-2}
_LOW_PRECISION_TOLERANCE = 0.2


@dataclass(frozen=True)
class CurvatureCheck:
    """How well Hessian-vector products agree, along the gradient g.

    Args:
        difference: |H g by autograd - H g by finite differences| / |H g|; None where
            the model allows only one of the two.
        asymmetry: |u.H g - g.H u| / |u.H g|, with u along H g.
    """

    difference: float | None
    asymmetry: float


def check_products(
    product: Product, other: Product | None, gradient: Parts
) -> CurvatureCheck:
    """Compare products along the gradient with those of another way to compute them.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    norm = norm_of(gradient)
    direction = [part / norm for part in gradient] if norm else gradient
    along = product(direction)
    length = norm_of(along)
    if not length:
        return CurvatureCheck(None if other is None else 0.0, 0.0)
    back = product([part / length for part in along])
    asymmetry = abs(dot(direction, back) - length) / length
    difference = None
    if other is not None:
        pairs = zip(along, other(direction), strict=True)
        difference = norm_of(one - two for one, two in pairs) / length
    tolerance = _TOLERANCE.get(gradient[0].dtype, _LOW_PRECISION_TOLERANCE)
    if max(asymmetry, difference or 0.0) > tolerance:
        shown = "unknown" if difference is None else f"{difference:.2g}"
        raise RuntimeError(
            f"The Hessian's self-check failed: asymmetry {asymmetry:.2g}, difference "
            f"between autograd and finite differences {shown}, tolerance {tolerance:g}."
            " An operation of the model has a wrong double backward, or the loss is not"
            ' smooth. Pass mode="finite_difference" with float32 parameters, or '
            "self_check=False."
        )
    return CurvatureCheck(difference, asymmetry)
