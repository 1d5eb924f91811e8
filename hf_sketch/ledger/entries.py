"""The rows of a ledger as numbers, and what is wrong with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.ledger.balance import Balance
from hf_sketch.store.blocks import row_blocks

Array = np.ndarray[Any, Any]
TOLERANCE: Final = 1e-5  # of the change; sums of rows in float32 are off by 1e-7
_ROW = 1e-9  # of an update, and _SUM of all weights: what float64 leaves of a balance
_SUM = 1e-12
_COLUMNS = ("step", "by_optimizer", "finite", "balance")


@dataclass(frozen=True, eq=False)
class Entries:
    """The rows of a ledger, in their order.

    Args:
        rows: what `load_updates` returns.
        balance: the map to balances.
    """

    rows: Dataset
    balance: Balance

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, balance: Array, step: int | None, ends: bool = False) -> int:
        """Return the row after which weights have a balance, as nearly as any.

        Args:
            balance: the weights', (16,).
            step: the steps before them; None if unknown.
            ends: return the last of equal rows, not the first.

        Returns:
            its place, of rows of this step if there are any, or else of the last step
            before; -1 if there are only later rows.
        """
        steps = self.columns["step"]
        if step is not None:
            earlier = steps[steps <= step]
            step = int(earlier.max()) if len(earlier) else -1
        found = np.flatnonzero(steps == step) if step is not None else range(len(self))
        if not len(found):
            return -1
        found = np.asarray(found)[:: -1 if ends else 1]
        off = np.linalg.norm(self.columns["balance"][found] - balance, axis=1)
        return int(found[np.where(np.isnan(off), np.inf, off).argmin()])

    def total(self, first: int, last: int) -> Tensor:
        """Return the sum of the rows after `first`, up to `last`, in float64."""
        total = torch.zeros(self.balance.row_size, dtype=torch.float64)
        for block in row_blocks(self.rows.select(range(first + 1, last + 1))):
            total += block.kept.sum(0, dtype=torch.float64)
        return total

    def walk(self, first: int, last: int) -> float:
        """Return the root of the sum of squared norms after `first`, up to `last`."""
        norms = self.columns["norm"][first + 1 : last + 1]
        return float(np.linalg.norm(np.nan_to_num(norms)))

    def problems(
        self, first: int, last: int, start: Array, steps: range, slack: float
    ) -> Iterator[str]:
        """Yield what is wrong with the rows after `first`, up to `last`.

        Args:
            first: the row after which the weights are those of the start; -1 if none.
            last: the last row.
            start: balance of the weights before the first row.
            steps: the steps that must have one row each.
            slack: largest difference between balances of two runs.
        """
        columns, own = self.columns, slice(first + 1, last + 1)
        yield from _missing(columns["step"][own][columns["by_optimizer"][own]], steps)
        before = np.concatenate([start[None], columns["balance"]])
        if first >= 0:
            before[first + 1] = columns["balance"][first]
        for place in range(first + 1, last + 1):
            if problem := self._problem(place, before[place], slack):
                yield problem

    def _problem(self, place: int, before: Array, slack: float) -> str | None:
        """What is wrong with a row, given the balance before it."""
        columns = self.columns
        step, norm = int(columns["step"][place]), float(columns["norm"][place])
        after, move = columns["balance"][place], columns["move"][place]
        if not np.isfinite(before).all():  # a row before was reported for that
            return None
        if not columns["finite"][place]:
            return f"The update of step {step} is NaN or infinite."
        off = float(np.linalg.norm(after - before - move))
        begins = norm == 0 and not columns["by_optimizer"][place]
        limit = _ROW * norm + _SUM * float(np.linalg.norm(after))
        if begins and off > max(limit, slack):
            return (
                f"The run that began after step {step} found other weights than the "
                f"rows before it lead to (off by {off:.2g})."
            )
        if not begins and not off <= limit:
            return (
                f"The row of step {step} does not follow from the row before it (off by"
                f" {off:.2g}, its update has norm {norm:.2g}). One of them was altered,"
                " or is not the one that was recorded there."
            )
        if norm > 0 and not columns["by_optimizer"][place]:
            return (
                f"The weights changed by {norm:.2g} after step {step}, and not by the "
                "optimizer."
            )
        return None

    @cached_property
    def columns(self) -> dict[str, Array]:
        """The columns of all rows, their norms, and the balances of their sketches."""
        found: dict[str, list[Tensor]] = {n: [] for n in (*_COLUMNS, "norm", "move")}
        for block in row_blocks(self.rows, *_COLUMNS):
            for name in _COLUMNS:
                found[name].append(block.columns[name])
            found["norm"].append(block.kept.double().norm(dim=1))
            found["move"].append(self.balance.of(block.kept))
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _missing(found: Array, steps: range) -> Iterator[str]:
    """Yield which steps have no row, or several."""
    numbers, counts = np.unique(found, return_counts=True)
    for step, count in zip(numbers[counts > 1], counts[counts > 1], strict=True):
        yield f"Step {step} has {count} rows."
    missing = np.setdiff1d(np.array(steps), numbers)
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    for run in runs if len(missing) else ():
        which = (
            f"Step {run[0]} has"
            if len(run) == 1
            else f"Steps {run[0]} to {run[-1]} have"
        )
        yield f"{which} no row."
    for step in np.setdiff1d(numbers, np.array(steps)):
        yield f"Step {step} is not between the checkpoints."
