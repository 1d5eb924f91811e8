"""Pairs of sentences for entailment: written for this project, or from a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_sketch import CounterRandom
from hf_sketch.recipes.texts.data_files import (
    check_columns,
    check_labels,
    check_texts,
    read_data_file,
)

LABELS = ("entailment", "neutral", "contradiction")
_NO_GOLD_LABEL = -1
_SIZES = {"train": 2000, "validation": 300}
_ADVERBIALS = ("mood", "company", "place", "hour", "season")  # in a sentence's order
_KINDS = ("job", "action", *_ADVERBIALS)
_SHOWN = 2  # kinds of facts in a premise
_REPEATED = 3  # of four hypotheses, are in a premise's words
Split = Literal["train", "validation"]
Choice = TypeVar("Choice")


def load_pairs(split: Split, file: str | None = None) -> Dataset:
    """Return pairs of sentences with labels: premise, hypothesis, label.

    Args:
        split: "train" (2,000 rows) or "validation" (300) of our own pairs.
        file: with the same columns, as of SNLI, instead of them; rows with the label
            -1 have no gold label and are left out.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: columns are missing, or a label is unknown.
    """
    return _own_pairs(split) if file is None else _pairs_of(file)


def check_files(train_file: str | None, validation_file: str | None) -> None:
    """Raise unless both files are given, or neither.

    Raises:
        ValueError: one is given without the other, whose rows would be our own.
    """
    if (train_file is None) != (validation_file is None):
        raise ValueError(
            f"Both files are needed, got train_file={train_file!r} and "
            f"validation_file={validation_file!r}. Pass --train_file and "
            "--validation_file, or neither."
        )


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Dataset:
    """Add the model's inputs for each pair of sentences, of so many tokens at most."""
    return dataset.map(
        lambda rows: tokenizer(
            rows["premise"], rows["hypothesis"], truncation=True, max_length=max_length
        ),
        batched=True,
        desc="Tokenizing",
    )


def _pairs_of(file: str) -> Dataset:
    rows = read_data_file(file)
    check_texts(rows, ("premise", "hypothesis"), file)
    check_columns(rows, ("label",), file)
    kept = rows.filter(lambda label: label != _NO_GOLD_LABEL, input_columns="label")
    if not len(kept):
        raise ValueError(
            f"{file} must have labels, got {_NO_GOLD_LABEL} in all of its "
            f"{len(rows)} rows, which means none: pass rows with gold labels."
        )
    labels = check_labels(kept, "label", LABELS, file)
    return kept.remove_columns("label").add_column("label", labels)


def _own_pairs(split: Split) -> Dataset:
    """The same pairs each time; no premise occurs twice, in one split or in both."""
    path = files("hf_sketch.recipes").joinpath("data", "scenes.json")
    scenes = json.loads(path.read_text(encoding="utf-8"))
    total = sum(_SIZES.values())
    numbers = iter(CounterRandom(0, "entailment").words(0, 32 * total).tolist())
    pairs: dict[str, dict[str, Any]] = {}
    while len(pairs) < total:
        pair = _pair(scenes, LABELS[len(pairs) % len(LABELS)], numbers)
        pairs.setdefault(pair["premise"], pair)
    first = 0 if split == "train" else _SIZES["train"]
    return Dataset.from_list([*pairs.values()][first : first + _SIZES[split]])


def _pair(
    scenes: Mapping[str, Any], label: str, numbers: Iterator[int]
) -> dict[str, Any]:
    """A pair in which neither sentence alone says anything of the label.

    The hypothesis is a fact of one kind, drawn whatever the label is. The premise of a
    neutral pair has no fact of that kind; that of another has one of the same group, or
    of another group, which excludes it.
    """
    kinds = list(_KINDS)
    about = _taken(kinds, numbers)
    group = _pick(scenes[about]["groups"], numbers)
    phrase = _pick(group["phrases"], numbers)
    said: dict[str, str] = {}
    if label == "entailment":
        said[about] = phrase
    elif label == "contradiction":
        others = [other for other in scenes[about]["groups"] if other is not group]
        said[about] = _pick(_pick(others, numbers)["phrases"], numbers)
    while len(said) < _SHOWN:
        kind = _taken(kinds, numbers)
        said[kind] = _pick(_pick(scenes[kind]["groups"], numbers)["phrases"], numbers)
    repeated = next(numbers) % 4 < _REPEATED
    fact = phrase if repeated else _pick(group["claims"], numbers)
    opening = scenes[about]["phrase" if repeated else "claim"]
    return {
        "premise": _premise(scenes, said, numbers),
        "hypothesis": _sentence(f"{opening} {fact}"),
        "label": LABELS.index(label),
    }


def _premise(
    scenes: Mapping[str, Any], said: Mapping[str, str], numbers: Iterator[int]
) -> str:
    """A sentence that says these phrases, one of each kind, and no other fact."""
    look, other = _pick(scenes["looks"], numbers), _pick(scenes["unnamed"], numbers)
    seen = _pick(scenes["unseen"], numbers)
    article = "an" if look[0] in "aeiou" else "a"
    words = [f"{article} {look} {said.get('job', other)} {said.get('action', seen)}"]
    words += [said[kind] for kind in _ADVERBIALS if kind in said]
    if next(numbers) % 2 and len(words) > 1:
        words.insert(0, f"{words.pop()},")
    return _sentence(" ".join(words))


def _pick(options: Sequence[Choice], numbers: Iterator[int]) -> Choice:
    return options[next(numbers) % len(options)]


def _taken(options: list[Choice], numbers: Iterator[int]) -> Choice:
    return options.pop(next(numbers) % len(options))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
