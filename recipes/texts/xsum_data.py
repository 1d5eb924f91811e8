"""XSum from the Hub or from a file, and summaries written for this project."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from hf_sketch.recipes.texts.data_files import check_texts, read_data_file
from hf_sketch.recipes.texts.scenes import (
    fixed_numbers,
    pick,
    scenes,
    sentence,
    taken,
    with_article,
)

_NAME = "EdinburghNLP/xsum"
_SIZES = {"train": 300, "validation": 40}
_BESIDES = (
    "nobody had announced it",
    "a dog watches from afar",
    "two children stop and stare",
    "the neighbors have seen it before",
    "a clock strikes somewhere",
    "one passer-by asks why and gets no answer",
    "it takes longer than planned",
    "the wind turns at last",
)
_REVISION = "refs/convert/parquet"  # the Hub's own copy: there is no script to run


def load_xsum(split: str = "train", file: str | None = None) -> Dataset:
    """Documents with their summaries: document, summary.

    Args:
        split: "train", "validation" or "test" of the Hub's dataset.
        file: file with the same columns to read instead.

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


def own_summaries(split: Literal["train", "validation"]) -> Dataset:
    """Return short documents with summaries, written for this project.

    A document says in five sentences what a person does, and where; its summary says
    the same in other words.

    Args:
        split: "train" (300 rows) or "validation" (40); no document occurs twice.
    """
    words, total = scenes(), sum(_SIZES.values())
    numbers = fixed_numbers("summaries", 32 * total)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < total:
        row = _summarized(words, numbers)
        rows.setdefault(row["document"], row)
    first = 0 if split == "train" else _SIZES["train"]
    return Dataset.from_list([*rows.values()][first : first + _SIZES[split]])


def _summarized(words: Mapping[str, Any], numbers: Iterator[int]) -> dict[str, str]:
    """A document and its summary."""
    kinds = ("job", "action", "place", "company", "hour", "season")
    groups = {kind: pick(words[kind]["groups"], numbers) for kind in kinds}
    said = {kind: pick(group["phrases"], numbers) for kind, group in groups.items()}
    claims = {kind: pick(groups[kind]["claims"], numbers) for kind in ("job", "action")}
    who = with_article(f"{pick(words['looks'], numbers)} {said['job']}")
    besides = [*_BESIDES]
    document = [
        f"{who} {said['action']} {said['place']}",
        taken(besides, numbers),
        f"it happens {said['hour']}, {said['season']}",
        f"the person is seen {said['company']}",
        taken(besides, numbers),
    ]
    where = groups["place"]["claims"][0]
    summary = f"someone who is {claims['job']} is {claims['action']} {where}"
    return {
        "document": " ".join(map(sentence, document)),
        "summary": sentence(summary),
    }


def tokenize_summaries(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
) -> Dataset:
    """The model's inputs and labels for each document.

    Args:
        dataset: document, summary.
        tokenizer: tokenizer of the model.
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
