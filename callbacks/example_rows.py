"""Rows of the store with each example's gradient."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_sketch.model_sketch import ModelSketch
from hf_sketch.per_example import ExampleRows, PerExampleSketcher
from hf_sketch.store import PER_EXAMPLE
from hf_sketch.writer import SketchWriter

from .example_ids import ExampleIds
from .moment import Moment


class ExampleRecorder:
    """Writes a row for each example of the micro-batches that train.

    Args:
        model: the model that trains.
        model_sketch: the map.
        loader: the training DataLoader.
    """

    def __init__(
        self, model: nn.Module, model_sketch: ModelSketch, loader: DataLoader[Any]
    ) -> None:
        self._sketcher = PerExampleSketcher(model, model_sketch)
        self._sketcher.recording = False
        self._sketcher.__enter__()
        self._ids = ExampleIds(loader)
        self._step_sum: Tensor | None = None

    def start_epoch(self, skipped_batches: int) -> None:
        """A pass over the training set begins, after `skipped_batches` batches."""
        self._ids.start_epoch(skipped_batches)

    def start_step(self, recording: bool) -> None:
        """An optimizer step begins."""
        self._sketcher.recording = recording
        self._step_sum = None

    def end_micro_batch(self, moment: Moment, writer: SketchWriter) -> None:
        """A backward pass has run: write its rows."""
        ids = self._ids.next_batch()
        if not self._sketcher.recording:
            return
        batch = self._sketcher.take()
        if len(ids) != len(batch.losses):
            raise RuntimeError(
                f"the batch has {len(batch.losses)} examples, the sampler drew "
                f"{len(ids)}: per-example rows need one row of the dataset for each "
                "example of a batch; pass per_example=False."
            )
        finite = batch.rows.isfinite().all(1)
        if not finite.all():
            broken = [
                i for i, good in zip(ids, finite.tolist(), strict=True) if not good
            ]
            warnings.warn(
                f"step {moment.step}: the gradients of examples {broken} are NaN or "
                "infinite; their rows are kept, with finite=False.",
                stacklevel=2,
            )
        writer.append(PER_EXAMPLE, _columns(moment, ids, batch, finite))
        weighted = batch.weights.to(batch.rows) @ batch.rows
        self._step_sum = (
            weighted if self._step_sum is None else self._step_sum + weighted
        )

    def end_step(self) -> Tensor | None:
        """The optimizer step is complete: the weighted sum of its rows, if recorded."""
        self._sketcher.recording = False
        return self._step_sum

    def close(self) -> None:
        """Take the hooks off the model and the sampler."""
        self._sketcher.__exit__()
        self._ids.close()


def _columns(
    moment: Moment, ids: list[int], batch: ExampleRows, finite: Tensor
) -> dict[str, Tensor]:
    """The columns of a micro-batch's rows."""
    count = len(ids)
    return {
        "example_id": torch.tensor(ids),
        "epoch": torch.full((count,), moment.epoch),
        "step": torch.full((count,), moment.step),
        "micro_step": torch.full((count,), moment.micro_step),
        "rank": torch.zeros(count, dtype=torch.int64),
        "learning_rate": torch.full(
            (count,), moment.learning_rate, dtype=torch.float64
        ),
        "loss": batch.losses,
        "weight": batch.weights,
        "gradient_norm": batch.rows.norm(dim=1),
        "finite": finite,
        "sketch": batch.rows,
    }
