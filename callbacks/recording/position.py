"""Where in training a row was recorded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A micro-batch's place in training.

    Args:
        epoch: counted from 0.
        step: the optimizer step that the micro-batch belongs to, counted from 1.
        micro_step: its place among the micro-batches of the step, from 0.
        learning_rate: of the step.
    """

    epoch: int
    step: int
    micro_step: int
    learning_rate: float
