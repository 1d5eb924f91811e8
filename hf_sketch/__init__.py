"""Sketches of gradients and Hessians for training data attribution."""

from importlib.metadata import version

from hf_sketch.collection import Sketches, load_sketches
from hf_sketch.example_losses import ExampleLosses, example_losses
from hf_sketch.implicit import implicit_sketch
from hf_sketch.measured_error import MeasuredError
from hf_sketch.model_sketch import Coverage, ModelSketch
from hf_sketch.per_example import ExampleRows, PerExampleSketcher
from hf_sketch.sketch_dataset import sketch_dataset
from hf_sketch.sketches import (
    AFFD,
    AFJL,
    FFD,
    FJL,
    QK,
    SRHT,
    Composed,
    CounterRandom,
    Dense,
    Sketch,
)

__version__ = version("hf-sketch")

__all__ = [
    "AFFD",
    "AFJL",
    "FFD",
    "FJL",
    "QK",
    "SRHT",
    "Composed",
    "CounterRandom",
    "Coverage",
    "Dense",
    "ExampleLosses",
    "ExampleRows",
    "MeasuredError",
    "ModelSketch",
    "PerExampleSketcher",
    "Sketch",
    "Sketches",
    "example_losses",
    "implicit_sketch",
    "load_sketches",
    "sketch_dataset",
]
