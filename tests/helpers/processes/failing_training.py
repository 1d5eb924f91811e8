"""Training in several processes of which one fails: scenarios of tests/processes."""

import os

import torch
from accelerate.state import PartialState
from transformers import TrainerCallback

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.model.group_sum import GroupSum
from tests.helpers.processes.joint_trainers import SIZE, leave, train


class Hidden(TrainerCallback):
    """Adds a gradient behind the modules' back, in the last process."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        if PartialState().is_last_process:
            model.classifier.weight.grad += 1.0


def unlike(directory):
    """The last process has other settings."""
    every = 1 + PartialState().is_last_process
    try:
        train(directory, GradientSketchCallback(SIZE, every_steps=every))
    except ValueError as error:
        leave(directory, error=str(error))


def uncovered(directory):
    """One process has a gradient that its rows do not explain."""
    try:
        train(directory, Hidden(), GradientSketchCallback(SIZE))
    except RuntimeError as error:
        leave(directory, error=str(error))


def disk(directory):
    """The last process cannot write any more."""
    plain_fsync, left = os.fsync, [6]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        plain_fsync(descriptor)

    if PartialState().is_last_process:
        os.fsync = fsync
    train(directory, GradientSketchCallback(SIZE, on_error="warn"))
    os.fsync = plain_fsync


def memory(directory):
    """The first process runs out of memory amid a step."""
    plain_add, calls = GroupSum.add_outer, [0]

    def add(self, name, left, right):
        calls[0] += 1
        if calls[0] > 120 and PartialState().is_main_process:
            raise torch.OutOfMemoryError("the device is full")
        plain_add(self, name, left, right)

    GroupSum.add_outer = add
    train(directory, GradientSketchCallback(SIZE, on_error="warn"))
    GroupSum.add_outer = plain_add


SCENARIOS = {
    f"ddp/{scenario.__name__}": scenario
    for scenario in (unlike, uncovered, disk, memory)
}
