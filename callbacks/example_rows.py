"""Rows of the store with each example's gradient."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_sketch.measured_error import MeasuredError, measure_error
from hf_sketch.model_sketch import ModelSketch
from hf_sketch.per_example import ExampleRows, PerExampleSketcher
from hf_sketch.rows import PER_EXAMPLE
from hf_sketch.writer import SketchWriter

from .example_ids import ExampleIds, content_ids
from .moment import Moment

_MEASURED_EXAMPLES = 8


class ExampleRecorder:
    """Writes a row for each example of the micro-batches that train.

    Args:
        model: the model that trains.
        model_sketch: the map.
        loader: the training DataLoader.
        loss: an example's own loss is the "mean" or the "sum" over its tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        model_sketch: ModelSketch,
        loader: DataLoader[Any],
        loss: str,
    ) -> None:
        self._sketcher = PerExampleSketcher(model, model_sketch, loss)
        self._sketcher.recording = False
        self._sketcher.__enter__()
        stream = isinstance(loader.dataset, IterableDataset)
        self._ids = None if stream else ExampleIds(loader)
        self._loader = loader
        self._step_sum: Tensor | None = None
        self._step_inputs: list[Mapping[str, Any]] = []
        self._warned = False

    def skipped_batches(self, steps: int, batches_per_step: int) -> int:
        """How many batches of its epoch training skips when it resumes after a step."""
        if self._ids is None:
            return 0
        updates = max(-(-len(self._loader) // batches_per_step), 1)
        return steps % updates * batches_per_step

    def start_epoch(self, skipped_batches: int) -> None:
        """A pass over the training set begins, after `skipped_batches` batches."""
        if self._ids is not None:
            self._ids.start_epoch(skipped_batches)

    def start_step(self, recording: bool) -> None:
        """An optimizer step begins."""
        self._sketcher.recording = recording
        self._step_sum = None
        self._step_inputs = []

    def end_micro_batch(
        self, moment: Moment, writer: SketchWriter, loss_scale: float
    ) -> None:
        """A backward pass has run: write its rows."""
        ids = None if self._ids is None else self._ids.next_batch()
        if not self._sketcher.recording:
            return
        inputs = self._sketcher.inputs
        batch = self._sketcher.take(loss_scale)
        split = self._sketcher.split_of(inputs)
        if ids is None:
            ids = content_ids(inputs, split, self._sketcher.main_input)
        if len(ids) != split.size:
            raise RuntimeError(
                f"the batch has {split.size} examples, the sampler drew {len(ids)}: "
                "per-example rows need one row of the dataset for each example of a "
                "batch; pass per_example=False."
            )
        finite = batch.rows.isfinite().all(1)
        self._warn(moment, ids, batch, finite)
        writer.append(PER_EXAMPLE, _columns(moment, ids, batch, finite))
        weighted = batch.weights.to(batch.rows) @ batch.rows
        self._step_sum = (
            weighted if self._step_sum is None else self._step_sum + weighted
        )
        if len(self._step_inputs) < _MEASURED_EXAMPLES and not self._warned:
            self._step_inputs.append(split.first(inputs, _MEASURED_EXAMPLES))

    def end_step(self) -> Tensor | None:
        """The optimizer step is complete: the weighted sum of its rows, if recorded."""
        self._sketcher.recording = False
        return self._step_sum

    def measure_error(self, low_precision: bool) -> MeasuredError | None:
        """The error of the step's first rows, if the model has a loss of its own."""
        if not self._step_inputs:
            return None
        return measure_error(
            self._sketcher,
            self._step_inputs,
            examples=_MEASURED_EXAMPLES,
            low_precision=low_precision,
        )

    def _warn(
        self, moment: Moment, ids: list[int], batch: ExampleRows, finite: Tensor
    ) -> None:
        """Say what is special about the rows."""
        if not finite.all():
            broken = [
                i for i, good in zip(ids, finite.tolist(), strict=True) if not good
            ]
            warnings.warn(
                f"step {moment.step}: the gradients of examples {broken} are NaN or "
                "infinite; their rows are kept, with finite=False.",
                stacklevel=3,
            )
        if batch.losses.isnan().all() and finite.all() and not self._warned:
            self._warned = True
            warnings.warn(
                "the loss is computed outside of the model (label smoothing, or "
                "compute_loss_func): a row is the gradient of its example's share of "
                "the batch's loss, times the batch size, and the loss column is NaN; a "
                "loss that compares examples with each other is not told apart.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Take the hooks off the model and the sampler."""
        self._sketcher.__exit__()
        if self._ids is not None:
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
