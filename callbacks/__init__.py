"""Callbacks for the Trainer of Transformers."""

from .gradient import GradientSketchCallback
from .hessian import HessianSpectrumCallback

__all__ = ["GradientSketchCallback", "HessianSpectrumCallback"]
