"""Products with a Hessian compared with each other: the check of each first use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = list[Tensor]
Product = Callable[[Parts], Parts]
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 5e-2}
_LOW_PRECISION_TOLERANCE = 0.2


@dataclass(frozen=True)
class CurvatureCheck:
    """How well products with a Hessian agree, along the gradient g.

    Args:
        difference: |H g by autograd - H g by finite differences| / |H g|; None where
            one of the two cannot be had.
        asymmetry: |u.H g - g.H u| / |u.H g| with u along H g.
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
    norm = _norm(gradient)
    direction = [part / norm for part in gradient] if norm else gradient
    along = product(direction)
    length = _norm(along)
    if not length:
        return CurvatureCheck(None if other is None else 0.0, 0.0)
    back = product([part / length for part in along])
    asymmetry = abs(_dot(direction, back) - length) / length
    difference = None
    if other is not None:
        pairs = zip(along, other(direction), strict=True)
        difference = _norm([one - two for one, two in pairs]) / length
    check = CurvatureCheck(difference, asymmetry)
    tolerance = _TOLERANCE.get(gradient[0].dtype, _LOW_PRECISION_TOLERANCE)
    if max(asymmetry, difference or 0.0) > tolerance:
        raise RuntimeError(
            "the Hessian must be symmetric, and the same by autograd and by finite "
            f"differences, within {tolerance:g}, got asymmetry {asymmetry:.2g} and "
            f"difference {difference if difference is None else f'{difference:.2g}'}: "
            "an operation of the model has a wrong double backward, or its loss is not "
            'smooth; pass mode="finite_difference" with float32 parameters, or '
            "self_check=False."
        )
    return check


def _norm(parts: Sequence[Tensor]) -> float:
    norms = torch.stack([torch.linalg.vector_norm(part) for part in parts])
    return float(norms.to(torch.float64).norm())


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    products = [
        torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)
    ]
    return float(torch.stack(products).to(torch.float64).sum())
