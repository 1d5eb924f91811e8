"""Classification data sets whose labels are partly made wrong, and their training."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_sketch import CounterRandom
from hf_sketch.recipes.tables.quality.lds_tasks import Digits, Perceptron, SnliHead
from hf_sketch.recipes.tables.silent_training import silent_training
from hf_sketch.recipes.texts.data_files import check_texts, read_data_file
from hf_sketch.recipes.texts.entailment import LABELS, load_pairs
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model

Examples = Sequence[Mapping[str, Any]]
_WINDOW = 8  # words of a passage whose source is to be guessed
_SAME = dict(
    re.findall(
        r"(\w+):(\w+)",
        "a:one an:one the:this man:guy woman:lady men:guys women:ladies person:someone "
        "people:folks boy:lad child:kid children:kids two:2 three:3 in:inside on:upon "
        "near:beside with:having while:as outside:outdoors young:youthful large:big "
        "small:little black:dark looking:gazing holding:carrying sitting:seated "
        "wearing:in walking:strolling running:racing playing:gaming and:plus "
        "said:stated has:holds was:became were:became from:out for:toward new:recent "
        "following:next first:initial after:since about:regarding its:their",
    )
)


@dataclass(frozen=True)
class LabelTask:
    """A classifier's data and how it is trained.

    Args:
        train: the model's inputs, with true labels.
        test: the same, of other rows.
        classes: number of labels.
        reworded: makes a near copy of an example.
        new_model: makes a model before training, of torch's seed.
        collator: makes a batch.
        settings: for `TrainingArguments`.
        out_size: numbers per sketch.
    """

    train: Examples
    test: Examples
    classes: int
    reworded: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    new_model: Callable[[], nn.Module]
    collator: Callable[[list[Any]], Mapping[str, Any]]
    settings: Mapping[str, Any]
    out_size: int


def digits_task(rows: int, test_rows: int, epochs: int) -> LabelTask:
    """Return scikit-learn's handwritten digits and a perceptron, by SGD."""
    digits = Digits(rows, test_rows, epochs)
    parts = [
        [{**row, "labels": int(row["labels"])} for row in part]
        for part in (digits.rows, digits.queries)
    ]
    return LabelTask(
        *parts,
        10,
        _smudged,
        Perceptron,
        default_data_collator,
        {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 32,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
        },
        1024,
    )


def snli_task(
    rows: int, test_rows: int, epochs: int, train_file: str, test_file: str
) -> LabelTask:
    """Return pairs of SNLI and the embedded MiniLM."""
    parts = [
        load_pairs(split, file).select(range(count)).to_list()
        for split, file, count in (
            ("train", train_file, rows),
            ("validation", test_file, test_rows),
        )
    ]
    return _minilm_task(parts, ("premise", "hypothesis"), epochs, LABELS)


def snli_head_task(
    rows: int, test_rows: int, epochs: int, train_file: str, test_file: str
) -> LabelTask:
    """Return pairs of SNLI and a head on the frozen MiniLM's embeddings, by AdamW."""
    pairs = SnliHead(rows, test_rows, epochs, train_file, test_file)
    parts = [
        [{**row, "labels": int(row["labels"])} for row in part]
        for part in (pairs.rows, pairs.queries)
    ]
    return LabelTask(
        *parts,
        len(LABELS),
        _blurred,
        pairs.new_model,
        default_data_collator,
        {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
        },
        4096,
    )


def sources_task(
    rows: int, test_rows: int, epochs: int, files: Sequence[str]
) -> LabelTask:
    """Return runs of eight words, the file of which MiniLM is to guess.

    Only lower-case words without punctuation are left of a text, so that tokenization
    gives nothing away.
    """
    count = -(-(rows + test_rows) // len(files))
    found = [_windows(path, count) for path in files]
    examples = [
        {"text": text, "label": label}
        for texts in zip(*found, strict=True)
        for label, text in enumerate(texts)
    ]
    parts = [examples[:rows], examples[rows : rows + test_rows]]
    return _minilm_task(parts, ("text",), epochs, files)


def accuracy_after(
    task: LabelTask,
    rows: Examples,
    directory: Path,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> float:
    """Train a new model on some rows and return its accuracy on the test rows."""
    set_seed(seed)
    trainer = Trainer(
        task.new_model(),
        silent_training(
            str(directory), seed, per_device_eval_batch_size=64, **task.settings
        ),
        train_dataset=rows,
        eval_dataset=task.test,
        data_collator=task.collator,
        compute_metrics=_accuracy,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def _minilm_task(
    parts: Sequence[list[dict[str, Any]]],
    columns: Sequence[str],
    epochs: int,
    labels: Sequence[str],
) -> LabelTask:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())

    def encoded(row: Mapping[str, Any]) -> dict[str, Any]:
        texts = {name: row[name] for name in columns}
        label = row.get("label", row.get("labels"))
        return {**texts, **tokenizer(*texts.values()), "labels": label}

    def reworded(row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row itself if fewer than two of its words have another for them."""
        texts = {name: row[name].split() for name in columns}
        if sum(word.lower() in _SAME for text in texts.values() for word in text) < 2:
            return row
        new = {
            name: " ".join(_SAME.get(word.lower(), word) for word in text)
            for name, text in texts.items()
        }
        return encoded({**row, **new})

    return LabelTask(
        *[[encoded(row) for row in part] for part in parts],
        len(labels),
        reworded,
        lambda: new_model(len(labels)),
        DataCollatorWithPadding(tokenizer),
        {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-4,
            "warmup_steps": 20,
        },
        4096,
    )


def _smudged(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A digit with every pixel changed by up to a sixteenth, as is its resolution."""
    blurred = _blurred(row)
    return {**blurred, "x": blurred["x"].clamp(0, 1)}


def _blurred(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example with every feature changed by up to a sixteenth."""
    noise = CounterRandom(0, "smudges").normals(0, row["x"].numel()).clamp(-1, 1)
    return {**row, "x": row["x"] + noise / 16}


def _windows(path: str, count: int) -> list[str]:
    """The first words of texts that have enough of them."""
    rows: Dataset = read_data_file(path)
    column = "text" if "text" in rows.column_names else "document"
    check_texts(rows, (column,), path)
    texts = (re.findall("[a-z]+", text.lower()) for text in rows[column])
    found = [" ".join(w[:_WINDOW]) for w in texts if len(w) >= 2 * _WINDOW][:count]
    if len(found) < count:
        raise ValueError(
            f"{path} must have {count} texts of at least {2 * _WINDOW} words, got "
            f"{len(found)}: pass fewer rows."
        )
    return found


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}
