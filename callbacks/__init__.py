"""Callbacks for the Trainer of Transformers."""

from .gradient import GradientSketchCallback

__all__ = ["GradientSketchCallback"]
