"""Rows of any dataset, after or without training."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.sketching import sketched_rows
from hf_sketch.examples.sketcher import ExampleLossFunction
from hf_sketch.model.sketch import ModelSketch


def sketch_dataset(
    model: nn.Module,
    dataset: Any,
    model_sketch: ModelSketch,
    *,
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    processing_class: Any = None,
    loss: str = "mean",
    loss_fn: ExampleLossFunction | None = None,
) -> GradientRows:
    """Sketch each example's gradient at the model's present weights.

    The units are those of the rows that training records: a row is the gradient of the
    example's own loss. The model runs in eval mode (no dropout); afterwards its modes
    are restored, and no parameter's `.grad` is touched.

    Args:
        model: the model, with the same parameters trainable as when `model_sketch` was
            made.
        dataset: tokenised examples, as for `Trainer(eval_dataset=...)`; columns that
            the model does not take are ignored.
        model_sketch: the map; for queries of a store, `store.model_sketch`.
        batch_size: examples per pass.
        data_collator: makes a batch of a list of examples; by default they are padded
            by `processing_class`, their labels by -100, or stacked if there is none.
        processing_class: a tokenizer, as for `Trainer`.
        loss: what a row is the gradient of: the "mean" or the "sum" of the model's loss
            over the example's tokens.
        loss_fn: your own target instead: maps (the model's output, its inputs) to one
            number per example, (b,), which depends on that example alone.

    Returns:
        the rows, in memory, with the row numbers of `dataset` as example_id.

    Raises:
        ValueError: the sketch is of another model, the model is not covered, its
            parameters are in shards, or it returns no loss for the columns.
        RuntimeError: a row of the first batch is not the gradient of its example alone.
    """
    options: Any = {
        "batch_size": batch_size,
        "data_collator": data_collator,
        "processing_class": processing_class,
        "loss": loss,
        "loss_fn": loss_fn,
    }
    rows = sketched_rows(model, dataset, model_sketch, **options)
    return GradientRows(model_sketch, rows)
