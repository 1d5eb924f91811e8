"""The examples that a guard protects."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from hf_sketch.attribution.methods import Cosine
from hf_sketch.attribution.sketching import evaluation_loader
from hf_sketch.examples.calls import IGNORED
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.state import evaluation_mode
from hf_sketch.processes import reduced

from ..recording.compiled import uncompiled


class GuardSet:
    """Sketches a guard set at the present state of the model.

    Batches are collated once, as the Trainer collates those of an evaluation. The
    processes share them out, and each gets all sketches.

    Args:
        trainer: the one that trains.
        queries: the examples.
        model: the model that trains.
        sketcher: reads the rows.

    Raises:
        ValueError: there are no examples, or they have no number.
    """

    def __init__(
        self,
        trainer: Trainer,
        queries: Any,
        model: nn.Module,
        sketcher: ExampleSketcher,
    ) -> None:
        if not has_length(queries) or not len(queries):
            raise ValueError(
                f"The guard set has no examples ({type(queries).__name__}). Pass a "
                "dataset with a length, like eval_dataset."
            )
        self._args, self._model, self._sketcher = trainer.args, model, sketcher
        self._count, size = len(queries), trainer.args.per_device_eval_batch_size
        rank, ranks = trainer.args.process_index, trainer.args.world_size
        own = range(rank, self._count, ranks)
        self._places = [list(own[i : i + size]) for i in range(0, len(own), size)]
        self._batches = _collated(trainer, model, queries, self._places)

    def sketched(self) -> Tensor:
        """Return the sketches, each divided by its norm; all processes call together.

        Sketches that are not finite become zeros.

        Shapes:
            returns (queries, out_size)

        Raises:
            ValueError: a batch has other rows than one per example.
        """
        like = next(iter(self._sketcher.parameters.values()))
        size = self._sketcher.model_sketch.row_size
        found = torch.zeros(self._count, size, device=like.device)
        with _ready(self._args, self._model, self._sketcher):
            for places, batch in zip(self._places, self._batches, strict=True):
                rows = self._sketcher.sketch(batch).rows
                if len(rows) != len(places):
                    raise ValueError(
                        f"A batch of {len(places)} examples of the guard set gave "
                        f"{len(rows)} rows. Pass examples of one row each."
                    )
                found[places] = rows.to(found)
        found = Cosine().transform(found.where(found.isfinite().all(1, True), 0.0))
        return reduced(found, "sum")


def check_ignored_labels(
    trainer: Trainer, model: nn.Module, sketcher: ExampleSketcher
) -> None:
    """Raise unless a label of -100 takes an example out of the loss.

    Every process tries it on the first two examples of the training set.

    Raises:
        ValueError: it does not, or examples have no numbers, or no labels of their own.
    """
    dataset: Any = trainer.train_dataset
    if not has_length(dataset):
        raise ValueError(
            f'action="quarantine" needs numbered examples, got a '
            f"{type(dataset).__name__}. Pass action='skip'."
        )
    places = list(range(min(2, len(dataset))))
    given: Any = dataset
    own = isinstance(dataset, Dataset)
    some = given.select(places) if own else Subset(given, places)
    (batch,) = _collated(trainer, model, some, [places])
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ValueError(
            'action="quarantine" sets labels to -100, but the batches of '
            f"{[*batch]} have no integer labels. Pass action='skip'."
        )
    if len(labels) != len(places):
        raise ValueError(
            'action="quarantine" sets the labels of examples to -100, but a batch of '
            f"{len(places)} has labels of shape {tuple(labels.shape)}. Pass a collator "
            "that gives one row per example, or action='skip'."
        )
    batch["labels"] = labels.clone()
    batch["labels"][0] = IGNORED
    with _ready(trainer.args, model, sketcher):
        found = sketcher.sketch(batch)
    if len(labels) > 1 and bool(found.weights[0] != 0):
        raise ValueError(
            'action="quarantine" sets labels to -100, but the loss of this model '
            "counts such examples. Pass action='skip'."
        )


def _collated(
    trainer: Trainer, model: nn.Module, dataset: Any, places: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return batches of a dataset on the device, as the Trainer makes them."""
    loader = evaluation_loader(trainer, dataset)
    batches: list[dict[str, Any]] = []
    with evaluation_mode(model):  # a collator may draw random numbers
        for own in places:
            batch = loader.collate_fn([loader.dataset[i] for i in own])
            batches.append(dict(send_to_device(dict(batch), trainer.args.device)))
    return batches


@contextmanager
def _ready(
    args: TrainingArguments, model: nn.Module, sketcher: ExampleSketcher
) -> Generator[None]:
    """Sketch nothing but what is asked for, in evaluation mode."""
    with uncompiled(args), evaluation_mode(model), sketcher, sketcher.paused():
        yield
