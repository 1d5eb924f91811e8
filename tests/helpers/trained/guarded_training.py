"""A separable task in a known order, one batch of which has wrong labels."""

import json
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sketch.callbacks import GradientSketchCallback, GuardCallback

BATCH, STEPS, WINDOW = 8, 30, 10
BAD_STEP = 22
BAD = [BATCH * (BAD_STEP - 1) + place for place in (1, 4, 6)]


class Separating(nn.Module):
    """Classify the sign of the first of four numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2)
        )

    def forward(self, x, labels=None):
        logits = self.layers(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def separable(rows, seed, wrong=()):
    """Examples, of which some have the other label."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += x[:, 0].sign()  # a margin, so that wrong labels stand out
    labels = (x[:, 0] > 0).long()
    labels[list(wrong)] = 1 - labels[list(wrong)]
    return Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})


def guarded_trainer(directory, *callbacks, bad=BAD, **arguments):
    """A Trainer with momentum, weight decay, clipping, dropout and a falling rate."""
    settings = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 0.03,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "train_sampling_strategy": "sequential",
    }
    return Trainer(
        Separating(),
        TrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=separable(BATCH * STEPS, 1, bad),
        callbacks=list(callbacks),
    )


def guard_of(action="warn", **options):
    settings = {"every": 5, "action": action, "window": WINDOW, "threshold": 5.0}
    return GuardCallback(separable(12, 2), **{**settings, **options})


def recorder(every_steps=1):
    return GradientSketchCallback(48, every_steps=every_steps)


def run(directory, *callbacks, resume=None, **arguments):
    """Train without the warnings of what stands out; return the Trainer."""
    trainer = guarded_trainer(directory, *callbacks, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step .* stands out", UserWarning)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines_of(directory):
    text = (Path(directory) / "guard.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def alarms_of(directory):
    return [line for line in lines_of(directory) if line["action"]]


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Around(TrainerCallback):
    """Keeps weights and what the optimizer keeps, before and after each step."""

    def __init__(self):
        self.before, self.after, self.rates = {}, {}, {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.before[state.global_step + 1] = self._taken(model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.after[state.global_step] = self._taken(model, optimizer)
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]

    def _taken(self, model, optimizer):
        kept = [
            value.clone()
            for parameter in model.parameters()
            for value in optimizer.state[parameter].values()
        ]
        return [p.detach().clone() for p in model.parameters()] + kept
