"""The rows of a batch's examples, and their error on the first batches."""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_sketch.examples.batch import ExampleBatch
from hf_sketch.examples.measured_error import MeasuredError, measure_error
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_shards
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.store.header import Header
from hf_sketch.store.rows import row_columns

from .arriving import steps_early
from .compiled import uncompiled, warn_of_cost
from .loss_check import LossCheck
from .origins.answers import Answers
from .origins.finder import FindOrigins, OriginFinder, Origins
from .origins.ids import followed_ids

MEASURED_EXAMPLES = 3


class ExampleReader:
    """Reads the rows of each batch's examples, and finds whose they are.

    Args:
        header: header of the store.
        trainer: the one that trains.
        model: the model that trains.
        loader: the training DataLoader.
        optimizer: the one that steps.
        measured: number of rows that are compared with exact gradients, True for three.
    """

    def __init__(
        self,
        header: Header,
        trainer: Trainer,
        model: nn.Module,
        loader: DataLoader[Any],
        optimizer: Optimizer,
        measured: bool | int,
    ) -> None:
        self._args, self._per_row = trainer.args, header.per_row
        warn_of_cost(self._args)
        early = steps_early(optimizer, trainer.deepspeed)
        self.sketcher = ExampleSketcher(
            model, header.model_sketch, header.loss, bool(measured), early
        )
        self._origins = OriginFinder(trainer, loader, self.sketcher)
        self._losses = LossCheck(trainer, self.sketcher)
        self._first = FirstBatches(measured)
        self._answers: Answers | None = None
        self._find: FindOrigins | None = None  # whose rows calls' batches are
        self.drawn: Sequence[int | None] | None = None  # ids of the present batch
        # Last, since nothing gives the sampler back if something fails here.
        self._ids = followed_ids(loader, self._args, trainer.state.global_step)

    def follow_answers(self, trainer: Trainer) -> Callable[[], None]:
        """Add columns of the answers that a Trainer generates; return what ends it."""
        self._answers = Answers(trainer)
        return self._answers.watch()

    def start_epoch(self) -> None:
        """Begin a pass over the training set."""
        if self._ids is not None:
            self._ids.start_epoch()

    def start_batch(self, collated: Any) -> None:
        """Begin a loader's batch, whether its rows are recorded or not."""
        self.drawn = None if self._ids is None else self._ids.next_batch()
        kept = copy.copy(collated)  # the Trainer may take parts out
        self._find = partial(self._origins.find, drawn=self.drawn, collated=kept)

    @contextmanager
    def watching(self, first: bool) -> Generator[None]:
        """Hold hooks on the model; see `LossCheck.watching` for `first`."""
        with ExitStack() as hooks:
            hooks.enter_context(uncompiled(self._args))
            hooks.enter_context(self.sketcher)
            if self._find is not None:
                hooks.enter_context(self._losses.watching(self._find, first))
            yield

    def read(
        self, position: Mapping[str, Tensor | float], loss_scale: float
    ) -> tuple[ExampleBatch, dict[str, Tensor]]:
        """Return a batch whose backward pass has run, and the columns of its rows.

        Its weights are shares of the step's gradient, which is the mean over the
        processes'.
        """
        batch = self.sketcher.take(loss_scale)
        assert self._find is not None
        origins = self._find(batch.calls)
        batch = replace(batch, weights=batch.weights / self._args.world_size)
        self._first.add(batch)
        place = {**position, "rank": self._args.process_index}
        if self._answers is not None:
            place |= self._answers.columns(len(batch.rows))
        loss = self.sketcher.loss
        return batch, example_columns(place, origins, batch, loss, self._per_row)

    def measure(self, low_precision: bool) -> MeasuredError | None:
        """Compare rows of the first batches; see `FirstBatches.measure`."""
        return self._first.measure(self.sketcher, low_precision)

    def forget(self) -> None:
        """Drop the first batches, and whose the rows of the present one are."""
        self._find = None
        self._first.forget()

    def close(self) -> None:
        """Give the loader its own sampler back."""
        if self._ids is not None:
            self._ids.close()


def example_columns(
    position: Mapping[str, Tensor | float],
    origins: Origins,
    batch: ExampleBatch,
    loss: str,
    per_row: bool,
) -> dict[str, Tensor]:
    """Return the columns of a batch's rows, without examples whose id is None.

    Args:
        position: columns known beforehand; numbers are the same for all rows.
        origins: which examples the rows belong to.
        batch: the rows.
        loss: an example's own loss, the "mean" or the "sum" over its tokens.
        per_row: keep rows of one example apart, with a column `part`.
    """
    rows, losses, weights, ids = batch.rows, batch.losses, batch.weights, origins.ids
    columns: dict[str, Tensor | float] = {**position}
    if per_row:
        ids = [None if p is None else origins.ids[p] for p in origins.places]
        columns["part"] = torch.tensor(origins.parts)
    elif not origins.one_each:
        rows, losses, weights = _added_up(batch, origins, loss)
        columns = {
            name: _means(value, origins) if isinstance(value, Tensor) else value
            for name, value in position.items()
        }
    kept = [row for row, example in enumerate(ids) if example is not None]
    if len(kept) < len(ids):
        rows, losses, weights = rows[kept], losses[kept], weights[kept]
        columns = {
            name: value[kept] if isinstance(value, Tensor) else value
            for name, value in columns.items()
        }
    own = torch.tensor([ids[row] for row in kept], dtype=torch.int64)
    columns = {"example_id": own, **columns}
    # Of a loss outside the model, all have the same but those that are not in it.
    weights = weights.where(~losses.isnan() | rows.any(1), 0)
    return row_columns(rows, **columns, loss=losses, weight=weights)


def _means(column: Tensor, origins: Origins) -> Tensor:
    """Return the mean of each example's rows."""
    places = [-1 if place is None else place for place in origins.places]
    own = torch.tensor(places, device=column.device)
    return torch.stack([column[own == i].mean() for i in range(len(origins.ids))])


def _added_up(
    batch: ExampleBatch, origins: Origins, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row, the loss and the weight of each example, given those of rows.

    Where losses are computed outside the model, each example has the same weight, as
    each row has.
    """
    size, own = len(origins.ids), batch.weights
    sums = torch.zeros(size, batch.rows.shape[1]).to(batch.rows)
    losses, weights = own.new_zeros(size), own.new_zeros(size)
    for example in range(size):
        rows = [row for row, p in enumerate(origins.places) if p == example]
        weight = own[rows]
        sums[example] = weight.to(sums) @ batch.rows[rows]
        losses[example] = weight @ batch.losses[rows].to(own)
        if rows:
            weights[example] = weight.max() if loss == "sum" else weight.sum()
    if batch.losses.isnan().all():
        weights = torch.full_like(weights, float(own.sum()) / size)
    divisor = weights.where(weights != 0, 1)
    return sums / divisor.to(sums).unsqueeze(1), losses / divisor, weights


class FirstBatches:
    """The first batches, whose rows are compared with exact gradients once.

    Args:
        examples: number of rows that are compared, True for three; 0 for none.
    """

    def __init__(self, examples: bool | int) -> None:
        self._examples = MEASURED_EXAMPLES if examples is True else int(examples)
        self._batches = list[ExampleBatch]()

    def add(self, batch: ExampleBatch) -> None:
        """Keep a batch, while its rows may be needed."""
        if len(self._batches) < self._examples:
            self._batches.append(batch)

    def forget(self) -> list[ExampleBatch]:
        """Return the batches and stop keeping them."""
        batches, self._batches, self._examples = self._batches, [], 0
        return batches

    def measure(
        self, sketcher: ExampleSketcher, low_precision: bool
    ) -> MeasuredError | None:
        """Compare rows of the batches that are kept.

        None if none has a loss yet, on a lazy device, which would compile each backward
        pass and product, for parameters in shards, which no process could gather alone,
        and for losses that are computed outside the model.
        """
        examples = self._examples
        if not any(bool(batch.weights.any()) for batch in self._batches):
            self._batches.clear()  # they have no labels
            return None
        batches = self.forget()
        losses = batches[-1].losses
        sharded = in_shards(sketcher.parameters.values())
        if is_lazy(losses) or sharded or bool(losses.isnan().all()):
            return None
        inputs = [call.inputs for batch in batches for call in batch.calls]
        with sketcher:
            return measure_error(
                sketcher, inputs, examples, low_precision=low_precision
            )
