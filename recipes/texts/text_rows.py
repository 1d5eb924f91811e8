"""Texts as a model's training examples, for any model that has a loss on text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sketch.model.state import evaluation_mode
from hf_sketch.recipes.texts.data_files import (
    check_columns,
    check_labels,
    check_texts,
)

_TEXTS = {
    "classification": (("premise", "hypothesis"), ("sentence1", "sentence2")),
    "causal": (("text",),),
    "seq2seq": (("document", "summary"), ("source", "target")),
}
_ONE_TEXT = (("text",), ("sentence",))
_LABELS = ("label", "labels")


@dataclass(frozen=True)
class TextModel:
    """A model, its tokenizer and what it is trained to do with text.

    Args:
        kind: "classification", "causal" or "seq2seq".
        model: the model, in evaluation mode.
        tokenizer: tokenizer of the model, with a token to pad with.
    """

    kind: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def collator(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Makes a batch of examples; a causal model's labels are padded as well."""
        if self.kind == "classification":
            return DataCollatorWithPadding(self.tokenizer)
        return DataCollatorForSeq2Seq(self.tokenizer)


def load_text_model(path: str) -> TextModel:
    """Load a model from a folder or the Hub, by what its configuration says it is.

    A folder of adapters gives its base model with them, trainable as in training.

    Raises:
        ValueError: it is not a classifier of sequences nor a language model.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return _with_saved_adapters(path)
    config = AutoConfig.from_pretrained(path)
    name = (config.architectures or ["no architecture"])[0]
    if name.endswith("ForSequenceClassification"):
        kind, auto = "classification", AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        kind, auto = "seq2seq", AutoModelForSeq2SeqLM
    elif name.endswith(("ForCausalLM", "LMHeadModel")):
        kind, auto = "causal", AutoModelForCausalLM
    else:
        raise ValueError(
            "a model must be a classifier of sequences, a causal or a sequence-to-"
            f"sequence language model, got {name} in {path}: sketch its queries in "
            "Python with hf_sketch.attribution.dataset."
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    return TextModel(kind, auto.from_pretrained(path).eval(), with_padding(tokenizer))


def _with_saved_adapters(path: str) -> TextModel:
    """Load the base model of saved adapters, with them and with their tokenizer."""
    config = PeftConfig.from_pretrained(path)
    base = load_text_model(str(config.base_model_name_or_path))
    model: Any = PeftModel.from_pretrained(base.model, path, is_trainable=True).eval()
    if not (Path(path) / "tokenizer_config.json").is_file():
        return replace(base, model=model)
    tokenizer = with_padding(AutoTokenizer.from_pretrained(path))
    return TextModel(base.kind, model, tokenizer)


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with its end of text if it has no token for that."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_columns(dataset: Dataset, kind: str, given: str | None = None) -> list[str]:
    """The columns that hold a dataset's texts.

    Args:
        dataset: the rows.
        kind: kind of the model.
        given: names, comma-separated; by default the first usual ones that are there.

    Raises:
        ValueError: there are none.
    """
    if given is not None:
        names = given.split(",")
        check_columns(dataset, names, "the rows")
        return names
    usual = (*_TEXTS[kind], *(_ONE_TEXT if kind == "classification" else ()))
    for columns in usual:
        if set(columns) <= set(dataset.column_names):
            return list(columns)
    raise ValueError(
        f"rows for a {kind} model must have one of the columns {usual}, got "
        f"{dataset.column_names}: name those of the texts with --text_columns."
    )


def tokenized(
    dataset: Dataset,
    text_model: TextModel,
    columns: Sequence[str],
    max_length: int | None = None,
    source: str = "the rows",
) -> Dataset:
    """The model's inputs and labels of each row; nothing else is kept.

    Raises:
        ValueError: a row of `source` lacks a text or, for a classifier, a label.
    """
    check_texts(dataset, columns, source)
    tokenizer, kind = text_model.tokenizer, text_model.kind
    limits: dict[str, Any] = {"truncation": True, "max_length": max_length}
    labels = [name for name in _LABELS if name in dataset.column_names]
    if kind == "classification" and not labels:
        raise ValueError(
            f"a classifier's rows must have a column label, got {dataset.column_names}:"
            " add what the query's loss is taken of."
        )
    if kind == "classification":
        names = text_model.model.config.id2label
        names = [names[number] for number in sorted(names)]
        numbers = check_labels(dataset, labels[0], names, source)
        dataset = dataset.remove_columns(labels[0]).add_column(labels[0], numbers)

    def encode(rows: dict[str, list[Any]]) -> Mapping[str, Any]:
        texts = [rows[name] for name in columns]
        if kind == "seq2seq":
            return tokenizer(texts[0], text_target=texts[1], **limits)
        encoded = tokenizer(*texts, **limits)
        encoded["labels"] = (
            rows[labels[0]] if kind == "classification" else encoded["input_ids"]
        )
        return encoded

    return dataset.map(
        encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing"
    )


def token_rows(row: Mapping[str, Any]) -> Dataset:
    """A causal model's row as one row for each token after the first, of its loss."""
    ids: list[int] = row["input_ids"]
    count = len(ids) - 1
    labels = [[-100] * len(ids) for _ in range(count)]
    for place, label in enumerate(labels, 1):
        label[place] = ids[place]
    same = {name: [value] * count for name, value in row.items() if name != "labels"}
    return Dataset.from_dict({**same, "labels": labels})


def token_losses(text_model: TextModel, row: Mapping[str, Any]) -> list[list[Any]]:
    """Each token of a causal model's row and its loss, 0 of the first."""
    device = text_model.model.device
    inputs = {name: torch.tensor([row[name]], device=device) for name in row}
    labels = inputs.pop("labels")[0, 1:]
    with torch.no_grad(), evaluation_mode(text_model.model):
        logits = text_model.model(**inputs).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    tokens = text_model.tokenizer.convert_ids_to_tokens(row["input_ids"])
    return [list(pair) for pair in zip(tokens, [0.0, *losses.tolist()], strict=True)]
