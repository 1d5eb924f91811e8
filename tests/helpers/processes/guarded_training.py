"""Guarded training in several processes: scenarios of tests/processes."""

import os

import torch
from accelerate.state import PartialState
from transformers import TrainerCallback

from tests.helpers.processes.joint_trainers import leave
from tests.helpers.trained.guarded_training import (
    BAD_STEP,
    BATCH,
    guard_of,
    losses_of,
    recorder,
    run,
)

LAST = [BATCH * BAD_STEP - place for place in (3, 2, 1)]  # the second process has these


class Stays(TrainerCallback):
    """Notes in which steps no weight changes."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.kept = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, model, **kwargs):
        pairs = zip(self.kept, model.parameters(), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            self.steps.append(state.global_step)


def trained(directory, *callbacks, bad=()):
    size = BATCH // int(os.environ["WORLD_SIZE"])
    options = {"per_device_train_batch_size": size, "ddp_backend": "gloo"}
    stays = Stays()
    trainer = run(directory, *callbacks, stays, bad=bad, **options)
    leave(directory, curve=losses_of(trainer), stays=stays.steps)
    rank = PartialState().process_index
    torch.save(trainer.model.state_dict(), directory / f"weights-{rank}.pt")
    PartialState().wait_for_everyone()


def plain(directory):
    trained(directory)


def quiet(directory):
    """Nothing stands out enough."""
    trained(directory, recorder(), guard_of("skip", threshold=1e6))


def skips(directory):
    """Only the last process has wrong labels."""
    trained(directory, recorder(), guard_of("quarantine"), bad=LAST)


SCENARIOS = {
    f"guarded/{scenario.__name__}": scenario for scenario in (plain, quiet, skips)
}
