"""Rows of the store with each example's gradient."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_sketch.examples.measured_error import MeasuredError, measure_error
from hf_sketch.examples.sketcher import ExampleBatch, ExampleSketcher
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.store.rows import PER_EXAMPLE, row_columns

from .ids import ExampleIds, check_stream, content_ids
from .position import Position
from .sink import Columns, HeldRows

_MEASURED_EXAMPLES = 8


class ExampleRecorder:
    """Writes a row for each example of the micro-batches that train.

    Args:
        model: the model that trains.
        model_sketch: the map.
        loader: the training DataLoader.
        loss: an example's own loss is the "mean" or the "sum" over its tokens.
        rank: of this process.
        world_size: number of processes that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        model_sketch: ModelSketch,
        loader: DataLoader[Any],
        loss: str,
        rank: int,
        world_size: int,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        loader = getattr(loader, "dataloader", loader)  # within torch_xla's
        self._loader = loader
        check_stream(loader, world_size)
        self._sketcher = ExampleSketcher(model, model_sketch, loss)
        stream = isinstance(loader.dataset, IterableDataset)
        self._ids = None if stream else ExampleIds(loader, world_size)
        self._sketcher.recording = False
        self._sketcher.__enter__()
        self._step_sum: Tensor | None = None
        self._step_inputs: list[Mapping[str, Any]] = []
        self._losses: Tensor | None = None
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
        self, moment: Position, rows: HeldRows, loss_scale: float
    ) -> None:
        """A backward pass has run: write its rows."""
        ids = None if self._ids is None else self._ids.next_batch()
        if not self._sketcher.recording:
            return
        batch = self._sketcher.take(loss_scale)
        split, inputs = batch.examples, batch.inputs
        if ids is None:
            ids = content_ids(inputs, split, self._sketcher.main_input)
        if len(ids) != split.size:
            raise RuntimeError(
                f"the batch has {split.size} examples, the sampler drew {len(ids)}: "
                "per-example rows need one row of the dataset for each example of a "
                "batch; pass per_example=False."
            )
        # A step's gradient is the mean over the processes'.
        batch = replace(batch, weights=batch.weights / self._world_size)
        weighted = batch.weights.to(batch.rows) @ batch.rows
        self._step_sum = (
            weighted if self._step_sum is None else self._step_sum + weighted
        )
        self._losses = batch.losses
        kept = [place for place, example in enumerate(ids) if example is not None]
        if kept:  # those whose turn it is
            if len(kept) < len(ids):
                batch = replace(
                    batch,
                    rows=batch.rows[kept],
                    losses=batch.losses[kept],
                    weights=batch.weights[kept],
                )
            own = [ids[place] for place in kept]
            rows.append(PER_EXAMPLE, _columns(moment, self._rank, own, batch))
        if len(self._step_inputs) < _MEASURED_EXAMPLES:
            self._step_inputs.append(split.first(inputs, _MEASURED_EXAMPLES))

    def end_step(self) -> Tensor | None:
        """The optimizer step is complete, if it is recorded.

        Returns:
            the weighted sum of this process's rows, with those of examples that fill up
            the last batches.
        """
        self._sketcher.recording = False
        return self._step_sum

    def measure_error(self, low_precision: bool) -> MeasuredError | None:
        """The error of the step's first rows, if the model has a loss of its own.

        None on a lazy device, which would compile each backward pass and product, and
        for parameters in shards, which no process could gather alone.
        """
        losses = self._losses
        if not self._step_inputs or losses is None or is_lazy(losses):
            return None
        if in_row_shards(self._sketcher.parameters.values()):
            return None
        if bool(losses.isnan().all()):
            return None
        return measure_error(
            self._sketcher,
            self._step_inputs,
            examples=_MEASURED_EXAMPLES,
            low_precision=low_precision,
        )

    def warn(self, columns: Columns) -> None:
        """Say what is special about the rows of a micro-batch, on the CPU."""
        finite = columns["finite"]
        if not finite.all():
            broken = columns["example_id"][~finite].tolist()
            warnings.warn(
                f"step {int(columns['step'][0])}: the gradients of examples {broken} "
                "are NaN or infinite; their rows are kept, with finite=False.",
                stacklevel=3,
            )
        if columns["loss"].isnan().all() and finite.all() and not self._warned:
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
    moment: Position, rank: int, ids: list[int | None], batch: ExampleBatch
) -> dict[str, Tensor]:
    """The columns of a micro-batch's rows."""
    return row_columns(
        batch.rows,
        example_id=torch.tensor(ids),
        epoch=moment.epoch,
        step=moment.step,
        micro_step=moment.micro_step,
        rank=rank,
        learning_rate=float(moment.learning_rate),
        loss=batch.losses,
        weight=batch.weights,
    )
