"""Trainings that are cheap to repeat on subsets of their rows, and queries of them."""

import importlib
import importlib.util
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import set_seed
from transformers.utils import logging

from hf_sketch import CounterRandom
from hf_sketch.recipes.setups import Setup, snli_setup
from hf_sketch.recipes.tables.quality.lds_training import Task
from hf_sketch.recipes.texts.entailment import (
    LABELS,
    check_files,
    load_pairs,
    tokenize,
)

_HIDDEN = 64


class Perceptron(nn.Module):
    """64 pixels, 64 hidden units, 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Digits(Task):
    """Handwritten digits of scikit-learn and a perceptron, by SGD with momentum.

    Args:
        rows: how many to train on.
        queries: how many others to ask of.
        epochs: passes over the rows.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    def __init__(self, rows: int, queries: int, epochs: int) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise ModuleNotFoundError(
                "the digits need the package scikit-learn, got none installed: call "
                "pip install scikit-learn."
            )
        digits = importlib.import_module("sklearn.datasets").load_digits()
        order = CounterRandom(0, "digits").permutation(len(digits.data)).tolist()
        images = torch.tensor(digits.data / 16, dtype=torch.float32)
        labels = torch.tensor(digits.target)
        examples = [{"x": images[i], "labels": labels[i]} for i in order]
        self.rows, self.queries = examples[:rows], examples[rows : rows + queries]
        self.collate = default_collate
        self.epochs, self.batch_size, self.batch_at_once = epochs, 32, 250
        self.smooth = False  # the kinks of ReLU
        self.decays = False

    def new_model(self) -> nn.Module:
        return Perceptron()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Snli(Task):
    """Pairs of SNLI, or our own, and the embedded MiniLM, by AdamW.

    Args:
        rows: how many to train on.
        queries: how many validation pairs to ask of.
        epochs: passes over the rows.
        train_file: premise, hypothesis, label; by default our own pairs.
        validation_file: the same for queries; goes with `train_file`.
        num_hidden_layers: number of layers that are kept; None for all.

    Raises:
        ValueError: one of the two files is given without the other.
    """

    def __init__(
        self,
        rows: int,
        queries: int,
        epochs: int,
        train_file: str | None = None,
        validation_file: str | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        check_files(train_file, validation_file)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # the classifier is new, as it should be
        set_seed(0)
        layers = {"num_hidden_layers": num_hidden_layers} if num_hidden_layers else {}
        setup = snli_setup(None, train_file, True, max_samples=rows, **layers)
        logging.set_verbosity(level)
        pairs = load_pairs("validation", validation_file)
        asked = tokenize(pairs.select(range(queries)), setup.tokenizer)
        self._model = setup.model
        self.rows, self.queries = inputs_of(setup.train_dataset), inputs_of(asked)
        self.collate = setup.collator
        self.epochs, self.batch_size, self.batch_at_once = epochs, 16, 32
        self.smooth = self.decays = True

    def new_model(self) -> nn.Module:
        model = deepcopy(self._model)
        nn.init.normal_(model.classifier.weight, std=0.02)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)


class Head(nn.Module):
    """A classifier of features, with three hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, _HIDDEN, _HIDDEN, _HIDDEN)
        hidden = [(nn.Linear(m, n), nn.GELU()) for m, n in pairwise(widths)]
        layers = (layer for pair in hidden for layer in pair)
        self.net = nn.Sequential(*layers, nn.Linear(_HIDDEN, len(LABELS)))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class SnliHead(Task):
    """A head on the frozen MiniLM's embeddings of such pairs, by AdamW.

    Its features are those of InferSent: both embeddings u and v, |u - v| and u v.

    Args:
        rows: see `Snli`, as for the rest.
        queries: how many validation pairs to ask of.
        epochs: passes over the rows.
        train_file: premise, hypothesis, label.
        validation_file: the same for queries.
        num_hidden_layers: number of MiniLM's layers that are kept.

    Raises:
        ValueError: one of the two files is given without the other.
    """

    def __init__(
        self,
        rows: int,
        queries: int,
        epochs: int,
        train_file: str | None = None,
        validation_file: str | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        check_files(train_file, validation_file)
        layers = {"num_hidden_layers": num_hidden_layers} if num_hidden_layers else {}
        setup = snli_setup(None, train_file, True, max_samples=rows, **layers)
        asked = load_pairs("validation", validation_file)
        pairs = setup.train_dataset, asked.select(range(queries))
        self.rows, self.queries = (embedded_pairs(setup, some) for some in pairs)
        self.collate = default_collate
        self.epochs, self.batch_size, self.batch_at_once = epochs, 32, 250
        self.smooth, self.decays = True, False

    def new_model(self) -> nn.Module:
        return Head(len(self.rows[0]["x"]))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)


def embedded_pairs(setup: Setup, pairs: Dataset) -> list[dict[str, Any]]:
    """Features and label of each pair, with the mean of a sentence's last states."""
    encoder = setup.model.base_model.eval()
    sides: list[Tensor] = []
    for name in ("premise", "hypothesis"):
        found: list[Tensor] = []
        texts: list[str] = pairs[name][:]
        for start in range(0, len(texts), 32):
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            inputs = setup.tokenizer(texts[start : start + 32], **options)
            with torch.no_grad():
                states = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            found.append((states * mask).sum(1) / mask.sum(1))
        sides.append(nn.functional.normalize(torch.cat(found), dim=1))
    u, v = sides
    features = torch.cat([u, v, (u - v).abs(), u * v], 1) * u.shape[1] ** 0.5
    labels = torch.tensor(pairs["label"][:])
    return [{"x": x, "labels": y} for x, y in zip(features, labels, strict=True)]


def inputs_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows in memory, without their texts."""
    return dataset.remove_columns(["premise", "hypothesis"]).to_list()
