"""What the Trainer logs of the recorded steps, beside their loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_sketch.attribution.questions.step_gradient import (
    noise_and_signal,
    step_shares,
)

from .trainers import wrap_method

Follower = Callable[[Mapping[str, Tensor]], None]  # takes a micro-batch's columns


class LiveLog:
    """Adds what rows say of the steps since the last log to the Trainer's own logs.

    Loggers (TensorBoard, W&B, trackio) come before a user's callbacks, so what these
    add to `logs` in `on_log` comes too late for them, and for `state.log_history`.
    `Trainer.log` is the place that the Trainer names for custom logs.

    Numbers stay on the device until then, when the Trainer waits for its loss anyway.
    In several processes they are of this process' examples, and of the steps of all.

    Args:
        processes: number of processes, with equally many examples each.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._batches: list[Mapping[str, Tensor]] = []
        self._last: Tensor | None = None  # the row of the last recorded step
        self._top: tuple[Tensor, Tensor] | None = None  # the share, and whose it is
        self._sums: dict[str, Tensor] = {}

    def start_step(self) -> None:
        """Begin an optimizer step."""
        self._batches.clear()

    def add_examples(self, columns: Mapping[str, Tensor]) -> None:
        """Note the rows of a micro-batch's examples."""
        self._batches.append(columns)

    def end_step(self, row: Mapping[str, Tensor]) -> None:
        """Note the row of the step that the examples entered."""
        gradient = row["sketch"][0]
        if self._last is not None:
            cosine = torch.cosine_similarity(self._last, gradient, dim=0)
            self._add("alignment", cosine, torch.ones_like(cosine))
        self._last = gradient
        if self._batches:
            self._add_examples(gradient / row["clip_factor"].to(gradient))

    def watch(self, trainer: Trainer) -> Callable[[], None]:
        """Add to a Trainer's logs from now on; return what ends it and frees rows."""
        undo = wrap_method(trainer, "log", self._log)

        def end() -> None:
            undo()
            self._batches.clear()
            self._last, self._top, self._sums = None, None, {}

        return end

    def _log(self, log: Callable[..., None], logs: Any, *args: Any, **kw: Any) -> None:
        """Call `Trainer.log`, with what was noted if it logs the training loss."""
        if "loss" in logs:
            logs.update(self._taken())
        log(logs, *args, **kw)

    def _add_examples(self, gradient: Tensor) -> None:
        """Note the largest share, and how much the examples' gradients differ."""
        ids, weights, rows = (
            torch.cat([columns[name] for columns in self._batches])
            for name in ("example_id", "weight", "sketch")
        )
        shares = step_shares(rows, weights, gradient)
        share, place = shares.nan_to_num(-math.inf).max(0)
        # Ids lie on the CPU: a copy that blocks would wait for the device.
        example = ids.to(rows.device, non_blocking=True).take(place)
        if self._top is not None:
            larger = share > self._top[0]
            share = torch.where(larger, share, self._top[0])
            example = torch.where(larger, example, self._top[1])
        self._top = share, example
        count = len(rows) * self._processes
        parts = any(bool(x["part"].any()) for x in self._batches if "part" in x)
        if count > 1 and not parts:
            self._add("noise_scale", *noise_and_signal(rows, weights, gradient, count))

    def _add(self, name: str, above: Tensor, below: Tensor) -> None:
        """Add to the two sums that a number is the ratio of, if they stay finite."""
        pair = torch.stack([above, below])
        pair = torch.where(pair.isfinite().all(), pair, 0)
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def _taken(self) -> dict[str, float]:
        """Return what was noted since the last time."""
        (top, sums), self._top, self._sums = (self._top, self._sums), None, {}
        logs: dict[str, float] = {}
        if top is not None and math.isfinite(share := float(top[0])):
            logs = {"sketch/top_share": share, "sketch/top_example": int(top[1])}
        for name, pair in sums.items():
            above, below = pair.tolist()
            if below > 0:  # or noise hides the mean gradient
                logs[f"sketch/{name}"] = above / below
        return logs
