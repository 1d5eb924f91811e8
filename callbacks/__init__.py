"""Callbacks for the Trainer of Transformers."""

from hf_sketch.callbacks.gradient import GradientSketchCallback

__all__ = ["GradientSketchCallback"]
