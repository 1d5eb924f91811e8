"""Training in shards where one process fails as gradients' rules are tried."""

from unittest.mock import patch

from accelerate.state import PartialState

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.modules import trial
from hf_sketch.examples.modules.probe import Reference
from tests.helpers.processes.distributed_training import SIZE, leave
from tests.helpers.processes.sharded_training import train


def failing(plain, error):
    """Does the same, and then fails in the last process."""

    def run(*args, **kwargs):
        result = plain(*args, **kwargs)
        if PartialState().is_last_process:
            raise error
        return result

    return run


def alone(directory):
    """One process cannot make what gradients are compared with."""
    failed = failing(trial.reference_of, ValueError("a part is odd"))
    with patch.object(trial, "reference_of", failed):
        try:
            train(directory, GradientSketchCallback(SIZE), max_steps=1)
        except RuntimeError as error:
            leave(directory, error=str(error))


def exhausted(directory):
    """One process runs out of memory, and ends."""
    failed = failing(Reference.differing, MemoryError("the device is full"))
    with patch.object(Reference, "differing", failed):
        train(directory, GradientSketchCallback(SIZE), max_steps=1)


SCENARIOS = {f"trial/{scenario.__name__}": scenario for scenario in (alone, exhausted)}
