"""Sketching operators: seeded linear maps that nearly keep inner products."""

from hf_sketch.sketches.affd import AFFD
from hf_sketch.sketches.afjl import AFJL
from hf_sketch.sketches.dense import Dense
from hf_sketch.sketches.ffd import FFD
from hf_sketch.sketches.fjl import FJL
from hf_sketch.sketches.grouped import Grouped
from hf_sketch.sketches.operator import Composed, Sketch, Transposed
from hf_sketch.sketches.qk import QK
from hf_sketch.sketches.srht import SRHT
from hf_sketch.sketches.transforms.random import CounterRandom

__all__ = [
    "AFFD",
    "AFJL",
    "FFD",
    "FJL",
    "QK",
    "SRHT",
    "Composed",
    "CounterRandom",
    "Dense",
    "Grouped",
    "Sketch",
    "Transposed",
]
