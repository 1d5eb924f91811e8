"""Pairs of sentences for entailment: written for this project, or from a file."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_sketch.recipes.texts.data_files import (
    check_columns,
    check_labels,
    check_texts,
    read_data_file,
)
from hf_sketch.recipes.texts.scenes import (
    fixed_numbers,
    pick,
    scenes,
    sentence,
    taken,
    with_article,
)

LABELS = ("entailment", "neutral", "contradiction")
_NO_GOLD_LABEL = -1
_SIZES = {"train": 2000, "validation": 300}
_ADVERBIALS = ("mood", "company", "place", "hour", "season")  # in a sentence's order
_KINDS = ("job", "action", *_ADVERBIALS)
_SHOWN = 2  # kinds of facts in a premise
_REPEATED = 3  # of four hypotheses, are in a premise's words
Split = Literal["train", "validation"]


def load_pairs(split: Split, file: str | None = None) -> Dataset:
    """Return pairs of sentences with labels: premise, hypothesis, label.

    Args:
        split: "train" (2,000 rows) or "validation" (300) of our own pairs.
        file: file with the same columns, such as SNLI's, to read instead; rows with the
            label -1 have no gold label and are left out.

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
    """Add the model's inputs for each pair of sentences, truncated to `max_length`."""
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
    words, total = scenes(), sum(_SIZES.values())
    numbers = fixed_numbers("entailment", 32 * total)
    pairs: dict[str, dict[str, Any]] = {}
    while len(pairs) < total:
        pair = _pair(words, LABELS[len(pairs) % len(LABELS)], numbers)
        pairs.setdefault(pair["premise"], pair)
    first = 0 if split == "train" else _SIZES["train"]
    return Dataset.from_list([*pairs.values()][first : first + _SIZES[split]])


def _pair(
    words: Mapping[str, Any], label: str, numbers: Iterator[int]
) -> dict[str, Any]:
    """A pair in which neither sentence alone says anything of the label.

    The hypothesis is a fact of one kind, drawn whatever the label is. The premise of a
    neutral pair has no fact of that kind; that of another has one of the same group, or
    of another group, which excludes it.
    """
    kinds = list(_KINDS)
    about = taken(kinds, numbers)
    group = pick(words[about]["groups"], numbers)
    phrase = pick(group["phrases"], numbers)
    said: dict[str, str] = {}
    if label == "entailment":
        said[about] = phrase
    elif label == "contradiction":
        others = [other for other in words[about]["groups"] if other is not group]
        said[about] = pick(pick(others, numbers)["phrases"], numbers)
    while len(said) < _SHOWN:
        kind = taken(kinds, numbers)
        said[kind] = pick(pick(words[kind]["groups"], numbers)["phrases"], numbers)
    repeated = next(numbers) % 4 < _REPEATED
    fact = phrase if repeated else pick(group["claims"], numbers)
    opening = words[about]["phrase" if repeated else "claim"]
    return {
        "premise": _premise(words, said, numbers),
        "hypothesis": sentence(f"{opening} {fact}"),
        "label": LABELS.index(label),
    }


def _premise(
    scene: Mapping[str, Any], said: Mapping[str, str], numbers: Iterator[int]
) -> str:
    """A sentence that says these phrases, one of each kind, and no other fact."""
    look, other = pick(scene["looks"], numbers), pick(scene["unnamed"], numbers)
    seen = pick(scene["unseen"], numbers)
    who = with_article(f"{look} {said.get('job', other)}")
    words = [f"{who} {said.get('action', seen)}"]
    words += [said[kind] for kind in _ADVERBIALS if kind in said]
    if next(numbers) % 2 and len(words) > 1:
        words.insert(0, f"{words.pop()},")
    return sentence(" ".join(words))
