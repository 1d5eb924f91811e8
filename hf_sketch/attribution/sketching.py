"""One pass over a dataset that sketches each example's gradient."""

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

from hf_sketch.examples.measured_error import measure_error
from hf_sketch.examples.sketcher import ExampleLossFunction, ExampleSketcher
from hf_sketch.model.fsdp import check_whole
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import evaluation_mode
from hf_sketch.store.rows import QUERY, arrow_table, features, row_columns

_CHECKED_EXAMPLES = 2
_LABELS = ("label", "label_ids", "labels")
_IGNORED = -100  # a label that has no loss


def sketched_rows(
    model: nn.Module,
    dataset: Any,
    model_sketch: ModelSketch,
    *,
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    processing_class: Any = None,
    loss: str = "mean",
    loss_fn: ExampleLossFunction | None = None,
) -> Dataset:
    """Return the rows of `sketch_dataset`, which says more, in memory."""
    sketcher = ExampleSketcher(model, model_sketch, loss)
    check_whole("sketch_dataset", sketcher.parameters.values())
    device = next(model.parameters()).device
    if data_collator is None and processing_class is not None:
        data_collator = partial(_padded, processing_class)
    names = {*inspect.signature(model.forward).parameters, *_LABELS}
    collate = partial(_collated, data_collator or _stack, names)
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    tables: list[pa.Table] = []
    with evaluation_mode(model), sketcher:
        for batch in tqdm(loader, desc="Sketching gradients", unit="batch"):
            moved = send_to_device(batch, device)
            found = sketcher.sketch(moved, loss_fn)
            if not tables:
                first = [sketcher.split_of(moved).first(moved, _CHECKED_EXAMPLES)]
                measure_error(sketcher, first, _CHECKED_EXAMPLES, loss_fn)
            done = sum(table.num_rows for table in tables)
            ids = torch.arange(done, done + len(found.losses))
            columns = row_columns(found.rows, example_id=ids, loss=found.losses)
            tables.append(arrow_table(QUERY, columns))
    schema = features(QUERY, model_sketch.row_size).arrow_schema
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return Dataset(InMemoryTable(table))


def text_inputs(model: Any, tokenizer: Any, text: str) -> list[dict[str, Any]]:
    """The inputs of a causal language model whose loss is that of a text's tokens.

    Raises:
        ValueError: the model is of another kind.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)()
    if not generates or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "a text alone is a query of a causal language model, got a "
            f"{type(model).__name__}: call sketch_dataset on rows with labels, and "
            "attribute on what it returns."
        )
    encoded = dict(tokenizer(text))
    return [{**encoded, "labels": list(encoded["input_ids"])}]


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


def _padded(processing_class: Any, examples: list[Any]) -> dict[str, Tensor]:
    """Pad examples as a tokenizer does, and labels of tokens by -100."""
    examples = [dict(example) for example in examples]
    name = next((n for n in _LABELS if isinstance(examples[0].get(n), list)), None)
    if name is None:
        return dict(processing_class.pad(examples, return_tensors="pt"))
    labels = [torch.as_tensor(example.pop(name)) for example in examples]
    lengths = [len(example["input_ids"]) for example in examples]
    # On the right: on the left a causal model's first token would have a loss, too.
    batch = dict(
        processing_class.pad(examples, padding_side="right", return_tensors="pt")
    )
    of_inputs = lengths == [len(row) for row in labels]
    width = batch["input_ids"].shape[1] if of_inputs else max(map(len, labels))
    batch["labels"] = torch.stack(
        [
            nn.functional.pad(row, (0, width - len(row)), value=_IGNORED)
            for row in labels
        ]
    )
    return batch


def _stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack each column of examples of equal lengths."""
    tensors = [
        {name: torch.as_tensor(value) for name, value in example.items()}
        for example in examples
    ]
    return default_collate(tensors)
