"""Rows of any dataset, after or without training."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.examples.measured_error import measure_error
from hf_sketch.examples.sketcher import ExampleLossFunction, ExampleSketcher
from hf_sketch.model.fsdp import check_whole
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import evaluation_mode
from hf_sketch.store.rows import QUERY, arrow_table, features, row_columns

_CHECKED_EXAMPLES = 2
_LABELS = ("label", "label_ids", "labels")


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
            by `processing_class`, or stacked if there is none.
        processing_class: a tokenizer, as for `Trainer`.
        loss: what a row is the gradient of: the "mean" or the "sum" of the model's loss
            over the example's tokens.
        loss_fn: your own target instead: maps (the model's output, its inputs) to one
            number per example, (b,), which depends on that example alone.

    Returns:
        the rows, in memory, with the row numbers of `dataset` as example_id.

    Raises:
        ValueError: the sketch is of another model, the model is not covered, or its
            parameters are in shards.
        RuntimeError: a row of the first batch is not the gradient of its example alone.
    """
    sketcher = ExampleSketcher(model, model_sketch, loss)
    check_whole("sketch_dataset", sketcher.parameters.values())
    device = next(model.parameters()).device
    if data_collator is None and processing_class is not None:
        data_collator = partial(processing_class.pad, return_tensors="pt")
    names = {*inspect.signature(model.forward).parameters, *_LABELS}
    collate = partial(_collated, data_collator or _stack, names)
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    tables: list[pa.Table] = []
    with evaluation_mode(model), sketcher:
        for batch in tqdm(loader, desc="Sketching gradients", unit="batch"):
            moved = send_to_device(batch, device)
            if not tables:
                first = [sketcher.split_of(moved).first(moved, _CHECKED_EXAMPLES)]
                measure_error(sketcher, first, _CHECKED_EXAMPLES, loss_fn)
            done = sum(table.num_rows for table in tables)
            found = sketcher.sketch(moved, loss_fn)
            ids = torch.arange(done, done + len(found.losses))
            columns = row_columns(found.rows, example_id=ids, loss=found.losses)
            tables.append(arrow_table(QUERY, columns))
    schema = features(QUERY, model_sketch.row_size).arrow_schema
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return GradientRows(model_sketch, Dataset(InMemoryTable(table)))


def _collated(
    collate: Callable[[list[Any]], Mapping[str, Any]],
    names: set[str],
    examples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Make the model's inputs of a list of examples, as the Trainer does."""
    kept = [
        {name: value for name, value in example.items() if name in names}
        for example in examples
    ]
    batch = dict(collate(kept))
    for name in _LABELS[:2]:
        if name in batch:
            batch["labels"] = batch.pop(name)
    return batch


def _stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack each column of examples of equal lengths."""
    tensors = [
        {name: torch.as_tensor(value) for name, value in example.items()}
        for example in examples
    ]
    return default_collate(tensors)
