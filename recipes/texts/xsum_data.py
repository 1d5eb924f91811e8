"""XSum from the Hub or from a file, and documents of our own to try a model on."""

import json
from importlib.resources import files
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from hf_sketch.recipes.texts.data_files import check_texts, read_data_file

_NAME = "EdinburghNLP/xsum"
_REVISION = "refs/convert/parquet"  # the Hub's own copy: there is no script to run


def load_xsum(split: str = "train", file: str | None = None) -> Dataset:
    """Documents with their summaries: document, summary.

    Args:
        split: "train", "validation" or "test" of the Hub's dataset.
        file: with the same columns, instead of it.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: columns are missing.
        ConnectionError: the Hub is out of reach.
    """
    if file is None:
        rows = load_dataset(_NAME, split=split, revision=_REVISION)
    else:
        rows = read_data_file(file)
    check_texts(rows, ("document", "summary"), file or _NAME)
    return rows


def load_short_documents() -> Dataset:
    """Eight short documents with summaries, written for this project."""
    path = files("hf_sketch.recipes").joinpath("data", "short_documents.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def tokenize_summaries(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
) -> Dataset:
    """The model's inputs and labels for each document.

    Args:
        dataset: document, summary.
        tokenizer: of the model.
        max_source_length: tokens of a document that are kept.
        max_target_length: tokens of a summary that are kept.
    """

    def inputs_of(rows: dict[str, Any]) -> dict[str, Any]:
        inputs = tokenizer(
            rows["document"], max_length=max_source_length, truncation=True
        )
        targets = tokenizer(
            text_target=rows["summary"], max_length=max_target_length, truncation=True
        )
        return {**inputs, "labels": targets["input_ids"]}

    return dataset.map(
        inputs_of,
        batched=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
