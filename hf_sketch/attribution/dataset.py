"""Rows of any dataset, after or without training."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.sketching import rows_by_trainer, sketched_rows
from hf_sketch.examples.sketcher import ExampleLossFunction
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.header import read_header
from hf_sketch.store.locations import store_directory


def sketch_dataset(
    model: nn.Module | None = None,
    dataset: Any = None,
    model_sketch: ModelSketch | None = None,
    *,
    trainer: Any = None,
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

    `sketch_dataset(trainer=trainer, dataset=dataset)` takes the model, the collator,
    the tokenizer, the columns, the batch size of evaluation and the loss from a
    Trainer, also a `compute_loss_func`, label smoothing or a `compute_loss` of its own.
    Where these compute the loss outside the model, a row is the gradient of its
    example's share of the batch's loss, times the batch size, as in training.

    Args:
        model: the model, with the same parameters trainable as when `model_sketch` was
            made.
        dataset: tokenized examples, as for `Trainer(eval_dataset=...)`; columns that
            the model does not take are ignored.
        model_sketch: the map; for queries of a store, `store.model_sketch`. With a
            `trainer` it defaults to the map of the store in its `output_dir`.
        trainer: a `Trainer` instead of the model and the options but `loss`.
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
        FileNotFoundError: there is no store in the Trainer's `output_dir`.
        TypeError: both a model and a Trainer were passed, or neither.
        ValueError: the sketch is of another model, the model is not covered, its
            parameters are in shards, or it returns no loss for the columns.
        RuntimeError: a row of the first batch is not the gradient of its example alone.
    """
    if trainer is not None:
        own = batch_size, data_collator, processing_class, loss_fn
        if model is not None or own != (8, None, None, None):
            raise TypeError(
                "A Trainer brings its model, batch size, collator, tokenizer and loss. "
                "Pass these or trainer=..., not both."
            )
        if model_sketch is None:
            directory = store_directory(trainer.args.output_dir)
            model_sketch = read_header(directory).model_sketch
        rows = rows_by_trainer(trainer, dataset, model_sketch, loss)
        return GradientRows(model_sketch, rows)
    if model is None or model_sketch is None:
        raise TypeError(
            "Pass a model and model_sketch=store.model_sketch, or trainer=..."
        )
    options: Any = {
        "batch_size": batch_size,
        "data_collator": data_collator,
        "processing_class": processing_class,
        "loss": loss,
        "loss_fn": loss_fn,
    }
    rows = sketched_rows(model, dataset, model_sketch, **options)
    return GradientRows(model_sketch, rows)
