"""The rows of a batch's examples, and their error on the first batches."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from hf_sketch.examples.batch import ExampleBatch
from hf_sketch.examples.measured_error import MeasuredError, measure_error
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.store.rows import row_columns

from .position import Position

MEASURED_EXAMPLES = 3


def example_columns(
    position: Position, ids: Sequence[int | None], batch: ExampleBatch
) -> dict[str, Tensor]:
    """Return the columns of a batch's rows, without examples that were used before.

    Args:
        position: the batch's.
        ids: of its examples; None for those that fill up the batch.
        batch: the rows, with the weights that they have in the step.

    Raises:
        RuntimeError: there is another number of ids than of examples.

    Shapes:
        returns every column (rows,), `sketch` (rows, out_size)
    """
    rows, losses, weights = batch.rows, batch.losses, batch.weights
    if len(ids) != len(rows):
        raise RuntimeError(
            f"The batch has {len(rows)} examples, but the sampler drew {len(ids)}. "
            "Per-example rows need one row of the dataset per example of a batch. "
            "Pass per_example=False."
        )
    own = [example for example in ids if example is not None]
    if len(own) < len(ids):
        kept = [place for place, example in enumerate(ids) if example is not None]
        rows, losses, weights = rows[kept], losses[kept], weights[kept]
    example_id = torch.tensor(own, dtype=torch.int64)
    places = asdict(position)
    return row_columns(
        rows, example_id=example_id, **places, loss=losses, weight=weights
    )


def measured_error(
    sketcher: ExampleSketcher, batches: Sequence[ExampleBatch], low_precision: bool
) -> MeasuredError | None:
    """Compare the rows of a few examples with exact gradients.

    None on a lazy device, which would compile each backward pass and product, for
    parameters in shards, which no process could gather alone, and for losses that are
    computed outside the model.

    Raises:
        RuntimeError: a row is not the sketch of its example's gradient.
    """
    losses = batches[-1].losses
    if is_lazy(losses) or in_row_shards(sketcher.parameters.values()):
        return None
    if bool(losses.isnan().all()):
        return None
    inputs = [batch.inputs for batch in batches]
    return measure_error(
        sketcher, inputs, examples=MEASURED_EXAMPLES, low_precision=low_precision
    )
