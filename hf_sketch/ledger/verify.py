"""Whether the updates of a store lead from one checkpoint to another."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_sketch.ledger.balance import Balance
from hf_sketch.ledger.checkpoint import Checkpoint
from hf_sketch.ledger.entries import TOLERANCE, Array, Entries
from hf_sketch.ledger.updates import load_updates
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.header import read_header
from hf_sketch.store.locations import store_directory

Weights = str | Path | Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingCheck:
    """Whether the recorded updates lead from one checkpoint to another.

    Args:
        first_step: optimizer steps before the first checkpoint.
        last_step: optimizer steps before the second.
        change: norm of the sketch of the weights' change between the two.
        residual: distance between that sketch and the sum of the updates, divided by
            `change`; 0 if both are 0.
        problems: what does not fit, each with its step; empty if the books balance.
    """

    first_step: int
    last_step: int
    change: float
    residual: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        steps = f"steps {self.first_step + 1} to {self.last_step}"
        if self.problems:
            return f"{steps}: " + "\n".join(self.problems)
        return (
            f"{steps}: the updates add up to the change between the checkpoints "
            f"(residual {self.residual:.1e} of its norm)"
        )


def verify_training(path: str | Path, before: Weights, after: Weights) -> TrainingCheck:
    """Check that nothing but the recorded steps lies between two checkpoints.

    The sketch is linear, so the updates of all steps between them must add up to the
    sketch of the weights' difference, and each row's balance must follow from that of
    the row before; see docs/ledger.md. No data is needed. Frozen parameters that both
    checkpoints have must be equal; buffers are not compared.

    Args:
        path: a Trainer's `output_dir` with `GradientSketchCallback(updates=True)`, the
            `sketches` in it, or a URL of either.
        before: folder of the first checkpoint, of a model or an adapter; or its weights
            by the names of the model's parameters.
        after: the same of the second one.

    Raises:
        FileNotFoundError: there is no store, or no checkpoint.
        ValueError: the store has no updates or is damaged, the second checkpoint comes
            before the first, or one lacks a parameter.

    Example:
        >>> check = verify_training("out", "out/checkpoint-100", "out/checkpoint-500")
        ... # doctest: +SKIP
        >>> check.problems  # doctest: +SKIP
        ('Step 321 has no row.',)
    """
    directory = store_directory(path)
    sketch = read_header(directory).model_sketch
    entries = Entries(load_updates(directory), Balance(sketch.row_size, sketch.seed))
    if not len(entries):
        raise ValueError(
            f"{directory} has no updates. Record them with "
            "GradientSketchCallback(updates=True)."
        )
    first = _End.found(sketch, entries, before)
    last = _End.found(sketch, entries, after, ends=True)
    return _check(sketch, entries, first, last)


@dataclass(frozen=True, eq=False)
class _End:
    """One of the two checkpoints.

    Args:
        checkpoint: its weights.
        sketch: the sketch of all weights that are trained, (row_size,), float64.
        balance: its balance, (16,).
        place: the row after which the weights should be these; -1 for before all rows.
        step: optimizer steps before it.
    """

    checkpoint: Checkpoint
    sketch: Tensor
    balance: Array
    place: int
    step: int

    @classmethod
    def found(
        cls,
        sketch: ModelSketch,
        entries: Entries,
        weights: Weights,
        ends: bool = False,
    ) -> "_End":
        """Find the place of a checkpoint."""
        source = weights if isinstance(weights, Mapping) else Path(weights)
        checkpoint = Checkpoint(source)
        sketched = _sketched(sketch, checkpoint)
        balance = entries.balance.of(sketched).numpy()
        step = checkpoint.step
        place = entries.place(balance, step, ends)
        if step is None:
            step = int(entries.columns["step"][place])
        return cls(checkpoint, sketched, balance, place, step)

    def problem(self, entries: Entries, slack: float) -> str | None:
        """What is wrong if the rows lead to other weights."""
        if self.place < 0:
            return None
        off = entries.columns["balance"][self.place] - self.balance
        if float(np.linalg.norm(off)) <= slack:
            return None
        return (
            f"The weights of {self.checkpoint} are not those that the store has after "
            f"step {self.step}."
        )


def _check(
    sketch: ModelSketch, entries: Entries, before: _End, after: _End
) -> TrainingCheck:
    """Compare the rows between two checkpoints with these."""
    if (after.place, after.step) < (before.place, before.step):
        raise ValueError(
            f"{after.checkpoint} comes before {before.checkpoint} in training. Swap the"
            " two checkpoints."
        )
    difference = after.sketch - before.sketch
    change = float(difference.norm())
    off = float((entries.total(before.place, after.place) - difference).norm())
    # Balances add up rounding since the first row, the sum that of its own rows alone.
    slack = TOLERANCE * max(change, entries.walk(-1, after.place))
    problems = [end.problem(entries, slack) for end in (before, after)]
    places = before.place, after.place
    steps = range(before.step + 1, after.step + 1)
    problems += entries.problems(*places, before.balance, steps, slack)
    if not off <= TOLERANCE * max(change, entries.walk(*places)):
        problems.append(
            "The updates do not add up to the change between the checkpoints: they are "
            f"off by {off:.2g}, and the change is {change:.2g}."
        )
    problems += _thawed(sketch, before.checkpoint, after.checkpoint)
    residual = off / change if change else off and math.inf
    found = tuple(problem for problem in problems if problem)
    return TrainingCheck(before.step, after.step, change, residual, found)


def _sketched(sketch: ModelSketch, end: Checkpoint) -> Tensor:
    """Sketch all weights that are trained, in float64, one parameter at a time."""
    total = sketch.sketch_sum()
    for name, shape in sketch.shapes:
        weights = end.tensor(name)
        if tuple(weights.shape) != shape:
            raise ValueError(
                f"{end} holds {name!r} with shape {tuple(weights.shape)}, the store "
                f"{shape}. Pass a checkpoint of the recorded training."
            )
        total.add(name, weights.to("cpu", torch.float64).reshape(1, -1))
    return total.result().squeeze(0)


def _thawed(
    sketch: ModelSketch, before: Checkpoint, after: Checkpoint
) -> Iterator[str]:
    """Yield the frozen parameters that have changed."""
    for name in sketch.frozen:
        if name in before.names and name in after.names:
            same = torch.equal(before.tensor(name), after.tensor(name))
            if not same:
                yield f"The frozen parameter {name} differs between the checkpoints."
