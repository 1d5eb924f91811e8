"""Sketching operators: seeded linear maps that nearly keep inner products."""

from hf_sketch.sketches.affd import AFFD
from hf_sketch.sketches.operator import Sketch, Transposed
from hf_sketch.sketches.qk import QK
from hf_sketch.sketches.random import CounterRandom

__all__ = ["AFFD", "QK", "CounterRandom", "Sketch", "Transposed"]
