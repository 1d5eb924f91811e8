"""A sample of SNLI that comes with the package, with labels flipped on purpose."""

import gzip
import json
from dataclasses import dataclass
from importlib.resources import files

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_sketch import CounterRandom

LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class FlippedLabels:
    """A training set whose labels were partly replaced by wrong ones.

    Args:
        dataset: the training set with the wrong labels in place.
        flipped: (rows,), whether each row's label is wrong.
        true_labels: (rows,), the labels as they were.
    """

    dataset: Dataset
    flipped: Tensor
    true_labels: Tensor


def load_snli_sample(split: str) -> Dataset:
    """The bundled rows of SNLI: premise, hypothesis, label.

    Args:
        split: "train" (2,000 rows) or "validation" (300).
    """
    path = files("hf_sketch.recipes").joinpath("data", f"snli_{split}.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def flip_labels(dataset: Dataset, fraction: float, seed: int) -> FlippedLabels:
    """Replace the labels of a random part of the rows by one of the two wrong ones."""
    labels = torch.tensor(dataset["label"][:])
    rng = CounterRandom(seed, "flipped-labels")
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[chosen] = True
    shift = 1 + (CounterRandom(seed, "wrong-labels").words(0, len(labels)) & 1)
    wrong = torch.where(flipped, (labels + shift) % len(LABELS), labels)
    changed = dataset.remove_columns("label").add_column("label", wrong.tolist())
    return FlippedLabels(changed, flipped, labels)


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
