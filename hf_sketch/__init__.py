"""Sketches of gradients and Hessians for training data attribution."""

from hf_sketch.collection import Sketches, load_sketches
from hf_sketch.example_losses import ExampleLosses, example_losses
from hf_sketch.model_sketch import Coverage, ModelSketch
from hf_sketch.per_example import ExampleRows, PerExampleSketcher
from hf_sketch.sketch_dataset import sketch_dataset
from hf_sketch.sketches import AFFD, QK, CounterRandom, Sketch

__all__ = [
    "AFFD",
    "QK",
    "CounterRandom",
    "Coverage",
    "ExampleLosses",
    "ExampleRows",
    "ModelSketch",
    "PerExampleSketcher",
    "Sketch",
    "Sketches",
    "example_losses",
    "load_sketches",
    "sketch_dataset",
]
