"""One pass over a dataset that sketches each example's gradient."""

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
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

from hf_sketch.examples.batch import ExampleBatch
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
    collate = collate_for(model, data_collator, processing_class)

    def rows_of(batch: Mapping[str, Any], first: bool) -> ExampleBatch:
        found = sketcher.sketch(batch, loss_fn)
        if first:
            some = [sketcher.split_of(batch).first(batch, _CHECKED_EXAMPLES)]
            measure_error(sketcher, some, _CHECKED_EXAMPLES, loss_fn)
        return found

    with evaluation_mode(model), sketcher:
        return _joined(sketcher, dataset, batch_size, collate, rows_of)


def rows_by_trainer(
    trainer: Any, dataset: Any, model_sketch: ModelSketch, loss: str
) -> Dataset:
    """Return the same, by a Trainer's own collator, columns and `compute_loss`.

    Raises:
        ValueError: the loss is made of several calls of the model, or a batch has other
            rows than one per example.
    """
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    sketcher = ExampleSketcher(model, model_sketch, loss)
    check_whole("sketch_dataset", sketcher.parameters.values())
    loader = evaluation_loader(trainer, dataset)

    def rows_of(batch: Mapping[str, Any], first: bool) -> ExampleBatch:
        with _kept_gradients(sketcher.parameters.values()):
            loss = trainer.compute_loss(model, dict(batch))
            sketcher.note_loss(loss)
            loss.backward()
            found = sketcher.take()
        if len(found.calls) > 1:
            raise ValueError(
                f"The loss of {type(trainer).__name__} calls the model "
                f"{len(found.calls)} times per batch. Pass the model, and a loss_fn."
            )
        if first and not bool(found.losses.isnan().all()):
            inputs = next(iter(found.calls)).inputs
            some = [sketcher.split_of(inputs).first(inputs, _CHECKED_EXAMPLES)]
            measure_error(sketcher, some, _CHECKED_EXAMPLES)
        return found

    size, collate = trainer.args.eval_batch_size, loader.collate_fn
    with evaluation_mode(model), sketcher:
        return _joined(sketcher, loader.dataset, size, collate, rows_of)


def evaluation_loader(trainer: Any, dataset: Any) -> Any:
    """Return a Trainer's loader of a dataset, for its `dataset` and its `collate_fn`.

    The loader itself may sort by length, drop examples or share them with processes.
    With persistent workers the Trainer keeps one loader for all its evaluations, which
    must not be this one.
    """
    args = trainer.args
    kept, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
    try:
        return trainer.get_eval_dataloader(dataset)
    finally:
        args.dataloader_persistent_workers = kept


def collate_for(
    model: nn.Module,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None,
    processing_class: Any,
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Return what makes a model's inputs of a list of examples, as the Trainer does."""
    if data_collator is None and processing_class is not None:
        data_collator = partial(_padded, processing_class)
    names = {*inspect.signature(model.forward).parameters, *_LABELS}
    return partial(_collated, data_collator or _stack, names)


def _joined(
    sketcher: ExampleSketcher,
    dataset: Any,
    batch_size: int,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    rows_of: Callable[[Mapping[str, Any], bool], ExampleBatch],
) -> Dataset:
    """Return the rows of all batches, which `rows_of` makes of each."""
    device = next(sketcher.model.parameters()).device
    loader: Any = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=partial(_counted, collate),
    )
    tables: list[pa.Table] = []
    done = 0
    for count, batch in tqdm(loader, desc="Sketching gradients", unit="batch"):
        found = rows_of(send_to_device(dict(batch), device), not tables)
        if len(found.losses) != count:
            raise ValueError(
                f"A batch of {count} examples gave {len(found.losses)} rows. Sketch "
                "data of one row per example; pairs and packed examples are recorded "
                "in training only."
            )
        ids = torch.arange(done, done + count)
        columns = row_columns(found.rows, example_id=ids, loss=found.losses)
        tables.append(arrow_table(QUERY, columns))
        done += count
    schema = features(QUERY, sketcher.model_sketch.row_size).arrow_schema
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return Dataset(InMemoryTable(table))


def _counted(
    collate: Callable[[list[Any]], Mapping[str, Any]], examples: list[Any]
) -> tuple[int, Mapping[str, Any]]:
    """Return a batch, and the number of its examples."""
    return len(examples), collate(examples)


@contextmanager
def _kept_gradients(parameters: Iterable[Tensor]) -> Generator[None]:
    """Clear gradients within the context, and restore them afterwards."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


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
    """Make inputs of the columns of these names, under the model's names."""
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
