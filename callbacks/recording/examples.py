"""The rows of a batch's examples, and their error on the first batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_sketch.examples.batch import ExampleBatch
from hf_sketch.examples.measured_error import MeasuredError, measure_error
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.store.rows import row_columns

MEASURED_EXAMPLES = 3


def example_columns(
    position: Mapping[str, float], ids: Sequence[int | None], batch: ExampleBatch
) -> dict[str, Tensor]:
    """Return the columns of a batch's rows, without examples whose id is None.

    Raises:
        RuntimeError: there is another number of ids than of examples.
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
    columns = {"example_id": torch.tensor(own, dtype=torch.int64), **position}
    return row_columns(rows, **columns, loss=losses, weight=weights)


def measured_error(
    sketcher: ExampleSketcher, batches: Sequence[ExampleBatch], low_precision: bool
) -> MeasuredError | None:
    """Compare the rows of a few examples with exact gradients.

    None on a lazy device, which would compile each backward pass and product, for
    parameters in shards, which no process could gather alone, and for losses that are
    computed outside the model.
    """
    losses = batches[-1].losses
    sharded = in_row_shards(sketcher.parameters.values())
    if is_lazy(losses) or sharded or bool(losses.isnan().all()):
        return None
    inputs = [batch.inputs for batch in batches]
    return measure_error(
        sketcher, inputs, examples=MEASURED_EXAMPLES, low_precision=low_precision
    )
