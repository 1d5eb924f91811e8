"""Training in shards where rules are wrong, or one process fails to try them."""

from unittest.mock import patch

from accelerate.state import PartialState
from peft import LoraConfig, get_peft_model

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.modules import trial
from hf_sketch.examples.modules.probe import Reference
from tests.helpers.processes.joint_trainers import SIZE, leave
from tests.helpers.processes.sharded_training import train
from tests.helpers.trained.training import undropped_bert
from tests.helpers.wrong_rules import wrong_first_factors


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


def adapted():
    """A model with adapters of LoRA, one of whose factors is zero."""
    adapter = LoraConfig(r=4, target_modules=["query", "value"])
    return get_peft_model(undropped_bert(), adapter)


def adapters(directory):
    """The rule of the other factor is wrong, which shows in the second step."""
    with wrong_first_factors():
        train(directory, GradientSketchCallback(SIZE), model=adapted())


SCENARIOS = {
    f"trial/{scenario.__name__}": scenario for scenario in (alone, exhausted, adapters)
}
