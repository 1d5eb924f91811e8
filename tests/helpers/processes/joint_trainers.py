"""Trainers whose processes take a batch together, and what they leave for a test."""

import json
import os
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.training import (
    Interrupt,
    tiny_dataset,
    tiny_trainer,
    undropped_bert,
)

SIZE = 64
GLOBAL_BATCH = 4


class Notes(TrainerCallback):
    """Keeps the gradients that the optimizer gets, and the examples that came."""

    def __init__(self):
        self.gradients = []
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        def note(module, args, kwargs):
            if module.training:  # the first token of an example is its row's number
                self.seen += (kwargs["input_ids"][:, 0] - 1).tolist()

        self.handle = model.register_forward_pre_hook(note, with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(n, p.grad) for n, p in model.named_parameters()]
        self.gradients.append({n: g.clone() for n, g in named if g is not None})

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


@contextmanager
def exchanged_sizes():
    """How many numbers our code adds up over the processes, each time."""
    sizes = []

    def noting(x, how):
        sizes.append(x.numel())
        return reduce(x, how)

    with patch("hf_sketch.processes.reduce", noting):
        yield sizes


def trainer_of(directory, *callbacks, rows=22, **arguments):
    """A Trainer whose batches hold the same examples in any number of processes."""
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
        "dataset": tiny_dataset(rows),
        "ddp_backend": "gloo",
    }
    return tiny_trainer(directory, *callbacks, **{**settings, **arguments})


def train(directory, *callbacks, resume=None, **arguments):
    """Train, and leave what became of it in the directory."""
    trainer = trainer_of(directory, *callbacks, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    leave(directory, curve=[entry["loss"] for entry in history if "loss" in entry])
    leave(directory, warnings=[str(warning.message) for warning in caught])
    rank = PartialState().process_index
    torch.save(trainer.model.state_dict(), directory / f"weights-{rank}.pt")
    PartialState().wait_for_everyone()


def leave(directory, **results):
    """Write down what this process has to tell."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        path = directory / f"{name}-{PartialState().process_index}.json"
        path.write_text(json.dumps(result))


def even():
    """Training that is the same in any number of processes."""
    # BERT's loss is a mean; by default the Trainer takes it for a share of a sum.
    settings = {"rows": 24, "average_tokens_across_devices": False}
    return {**settings, "model": undropped_bert()}


def stopped(directory, callback=None, **arguments):
    callbacks = callback or GradientSketchCallback(SIZE), Interrupt(5)
    try:
        train(directory, *callbacks, **arguments)
    except KeyboardInterrupt:
        PartialState().wait_for_everyone()
