"""Callbacks for the Trainer of Transformers."""

from .gradient import GradientSketchCallback
from .guard import GuardCallback
from .hessian import HessianSpectrumCallback
from .intrinsic_dimension import IntrinsicDimensionCallback

__all__ = [
    "GradientSketchCallback",
    "GuardCallback",
    "HessianSpectrumCallback",
    "IntrinsicDimensionCallback",
]
