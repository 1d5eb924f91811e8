"""The rows of a batch's examples, and their error on the first batches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sketch.examples.batch import ExampleBatch
from hf_sketch.examples.measured_error import MeasuredError, measure_error
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_shards
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.store.rows import row_columns

from .origins.finder import Origins

MEASURED_EXAMPLES = 3


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
