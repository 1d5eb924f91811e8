"""Training that is cheap to repeat on subsets of its rows, recorded or not."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor, nn
from transformers import set_seed

from hf_sketch import GradientRows, ModelSketch
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.store.rows import QUERY, arrow_table, row_columns

Collate = Callable[[list[Any]], Mapping[str, Any]]
_HIDDEN = 64


@dataclass(frozen=True)
class Snapshot:
    """A model on its way.

    Args:
        learning_rate: learning rate of its steps.
        model: the model, in evaluation mode.
    """

    learning_rate: float
    model: nn.Module


class Task(ABC):
    """A training of some epochs, with the seed of its weights and of its order.

    Args:
        rows: examples to train on.
        queries: examples whose loss is foretold.
        collate: makes the model's inputs of a list of either.
        epochs: passes over the rows.
        batch_size: examples in a step.
        batch_at_once: examples in a pass without a step.
        smooth: whether finite differences of the gradient can check a Hessian.
        decays: whether the learning rate falls to 0, step by step.
    """

    rows: Any
    queries: Any
    collate: Collate
    epochs: int
    batch_size: int
    batch_at_once: int
    smooth: bool
    decays: bool

    @abstractmethod
    def new_model(self) -> nn.Module:
        """A model before training, of torch's seed."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new one for a model."""

    def train(
        self, rows: Tensor, seed: int, epochs: Collection[int] = ()
    ) -> list[Snapshot]:
        """Train a new model on the rows of these numbers.

        Returns:
            its value after that many epochs, and at the end.
        """
        model, optimizer = self._start(seed)
        snapshots: list[Snapshot] = []
        for epoch in range(self.epochs):
            if epoch in epochs:
                rate = optimizer.param_groups[0]["lr"]
                snapshots.append(Snapshot(rate, deepcopy(model)))
            for number, batch in enumerate(self._batches(rows)):
                self._set_rate(optimizer, epoch, number, len(rows))
                model(**self.batch(self.rows, batch))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
        return [*snapshots, Snapshot(optimizer.param_groups[0]["lr"], model)]

    def record(self, sketch: ModelSketch, seed: int = 0) -> GradientRows:
        """Return the rows of all epochs of the training on all rows with a seed."""
        model, optimizer = self._start(seed)
        every = torch.arange(len(self.rows))
        tables: list[pa.Table] = []
        rates: list[float] = []
        with ExampleSketcher(model, sketch) as sketcher:
            for epoch in range(self.epochs):
                for number, batch in enumerate(self._batches(every)):
                    rate = self._set_rate(optimizer, epoch, number, len(every))
                    model(**self.batch(self.rows, batch))["loss"].backward()
                    taken = sketcher.take()
                    optimizer.step()
                    optimizer.zero_grad()
                    columns = row_columns(
                        taken.rows, example_id=batch, loss=taken.losses
                    )
                    tables.append(arrow_table(QUERY, columns))
                    rates += [rate] * len(batch)
        rows = Dataset(InMemoryTable(pa.concat_tables(tables)))
        return GradientRows(sketch, rows.add_column("learning_rate", rates))

    def _set_rate(
        self, optimizer: torch.optim.Optimizer, epoch: int, number: int, rows: int
    ) -> float:
        """Set the learning rate of an epoch's step, and return it."""
        group = optimizer.param_groups[0]
        first = group.setdefault("initial_lr", group["lr"])
        steps = -(-rows // self.batch_size)
        left = 1 - (epoch * steps + number) / (self.epochs * steps)
        group["lr"] = first * left if self.decays else first
        return group["lr"]

    def _start(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A new model, without dropout so that losses follow the rows alone."""
        set_seed(seed)
        model = self.new_model().eval()
        return model, self.optimizer(model)

    def _batches(self, rows: Tensor) -> Sequence[Tensor]:
        """An epoch's, in a new order."""
        return rows[torch.randperm(len(rows))].split(self.batch_size)

    def batch(self, examples: Any, numbers: Tensor) -> Mapping[str, Any]:
        """The model's inputs of some examples."""
        return self.collate([examples[i] for i in numbers.tolist()])

    def batches(self, rows: int) -> list[Mapping[str, Any]]:
        """The first rows, for a Hessian."""
        numbers = torch.arange(min(rows, len(self.rows))).split(self.batch_at_once)
        return [self.batch(self.rows, some) for some in numbers]

    def losses(self, model: nn.Module) -> Tensor:
        """Each query's loss, (queries,)."""
        found: list[Tensor] = []
        with torch.no_grad():
            for numbers in torch.arange(len(self.queries)).split(self.batch_at_once):
                inputs = self.batch(self.queries, numbers)
                found.append(example_losses(model(**inputs), inputs))
        return torch.cat(found)


def example_losses(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The cross-entropy of each example of a batch, in a text the mean over tokens."""
    logits, labels = output["logits"], inputs["labels"]
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)
