"""Where in training a row was recorded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A micro-batch's place in training.

    Args:
        epoch: passes over the training set before this one.
        step: the optimizer step that the micro-batch belongs to, counted from 1.
        micro_step: its place among the micro-batches of the step, from 0.
        rank: the process that computed it.
        learning_rate: the step's, of the first parameter group.
    """

    epoch: int
    step: int
    micro_step: int
    rank: int
    learning_rate: float
