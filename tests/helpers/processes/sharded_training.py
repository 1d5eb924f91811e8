"""Training of parameters in shards (FSDP2): scenarios of tests/processes."""

import os
import warnings
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_sketch import HessianOperator, SubspaceConfig
from hf_sketch.callbacks import GradientSketchCallback, HessianSpectrumCallback
from hf_sketch.callbacks.recording import steps
from hf_sketch.callbacks.recording.steps import step_columns
from hf_sketch.model import gradient_pass
from hf_sketch.recipes.tables.measure import peak_extra_bytes
from tests.helpers.processes.joint_trainers import (
    GLOBAL_BATCH,
    SIZE,
    exchanged_sizes,
    leave,
)
from tests.helpers.processes.sharded_models import sharded
from tests.helpers.trained.training import (
    TINY_TRAINING,
    tiny_batch,
    tiny_bert,
    tiny_dataset,
    undropped_bert,
)

GREATEST = (2**16, 128)  # the shape of a model's one great parameter
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
}


class Collectives(TorchDispatchMode):
    """Counts the processes' exchanges, by kind."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            name = func.name()
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def train(directory, *callbacks, model=None, resume=None, **arguments):
    """Train as Accelerate does with FSDP2, and leave what became of it.

    On CPUs it would use DDP instead, so they pose as devices of another kind.
    """
    settings = {**TINY_TRAINING, "ddp_backend": "gloo", **per_process(), **arguments}
    os.environ.update(FSDP2)
    settings = TrainingArguments(str(directory), **settings)
    assert settings.world_size > 1  # which sets the processes up
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    trainer = Trainer(
        undropped_bert() if model is None else model,
        settings,
        train_dataset=tiny_dataset(24),
        callbacks=list(callbacks),
    )
    with Collectives() as collectives:
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.is_fsdp2
    leave(directory, collectives=collectives.counts)
    leave_results(directory, trainer)


def per_process():
    """As many examples in a step as one process has."""
    batch_size = GLOBAL_BATCH // int(os.environ["WORLD_SIZE"])
    return {
        "per_device_train_batch_size": batch_size,
        "average_tokens_across_devices": False,
    }


def leave_results(directory, trainer):
    history = trainer.state.log_history
    leave(directory, curve=[entry["loss"] for entry in history if "loss" in entry])
    rank = PartialState().process_index
    weights = {n: p.to_local() for n, p in trainer.model.named_parameters()}
    torch.save(weights, directory / f"weights-{rank}.pt")
    PartialState().wait_for_everyone()


def watched(directory):
    with exchanged_sizes() as exchanged:
        train(directory, GradientSketchCallback(SIZE))
    leave(directory, exchanged=exchanged)


def blocked(directory):
    train(directory, GradientSketchCallback(SIZE, layout="blocked", per_example=False))


def at_once(directory):
    """By the kernels for all tensors, which Triton interprets on CPUs."""
    os.environ["TRITON_INTERPRET"] = "1"
    callback = GradientSketchCallback(SIZE, per_example=False)
    with (
        patch.object(gradient_pass, "can_launch", lambda device: True),
        exchanged_sizes() as exchanged,
    ):
        train(directory, callback)
    leave(directory, exchanged=exchanged)


def ledger(directory):
    """With rows of updates."""
    train(directory, GradientSketchCallback(SIZE, updates=True, per_example=False))


def layers(directory):
    """With a sketch of each of three groups of layers."""
    train(directory, GradientSketchCallback(SIZE, groups=3))


def checkpointed(directory):
    """With activation checkpointing of each layer, by FSDP's own wrappers."""
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    train(directory, GradientSketchCallback(SIZE))
    del os.environ["FSDP_ACTIVATION_CHECKPOINTING"]


def mixed(directory):
    """In bfloat16, by FSDP's own policy."""
    train(directory, GradientSketchCallback(SIZE), bf16=True)


def memory(directory):
    """The most bytes that the row of a step takes, in each layout."""
    for layout in ("grouped", "blocked"):
        peaks = []

        def measuring(*args, peaks=peaks):
            results = []
            peaks.append(peak_extra_bytes(lambda: results.append(step_columns(*args))))
            return results[0]

        callback = GradientSketchCallback(SIZE, layout=layout, per_example=False)
        model = tiny_bert(vocab_size=GREATEST[0], hidden_size=GREATEST[1])
        with patch.object(steps, "step_columns", measuring):
            train(directory / layout, callback, model=model, max_steps=3)
        leave(directory, **{layout: peaks})


def plain(directory):
    """With dropout."""
    train(directory, model=tiny_bert())


def dropped(directory):
    """The same with rows."""
    train(directory, GradientSketchCallback(SIZE), model=tiny_bert())


def resumed(directory):
    """Goes on with the rows of `watched` after its second checkpoint."""
    resume = str(directory.parent / "watched" / "checkpoint-4")
    train(directory, GradientSketchCallback(SIZE), resume=resume)


def refused(directory):
    """What does not take shards: an error before training; a warning, and no file."""
    flat = GradientSketchCallback(SIZE, layout="flat", per_example=False)
    try:
        train(directory, flat)
    except ValueError as error:
        leave(directory, flat=str(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(directory, HessianSpectrumCallback([1], krylov_dim=2))
    leave(directory, spectrum=[str(warning.message) for warning in caught])
    head = SubspaceConfig(dim=8, modules_to_save=["classifier"])
    adapted, model = get_peft_model(undropped_bert(), head), sharded(undropped_bert())
    actions = {
        "exchanged": lambda: train(directory, model=adapted),
        "subspace": lambda: get_peft_model(model, SubspaceConfig(dim=8)),
        "curvature": lambda: HessianOperator(model, [tiny_batch()]),
    }
    for name, action in actions.items():
        try:
            action()
        except ValueError as error:
            leave(directory, **{name: str(error)})


def replicas(directory):
    """Two replicas of two shards each, as HSDP has them."""
    PartialState(cpu=True, backend="gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(undropped_bert(), mesh)
    settings = {**TINY_TRAINING, **per_process(), "save_strategy": "no"}
    arguments = TrainingArguments(str(directory), **settings)
    callback = GradientSketchCallback(SIZE)
    data = tiny_dataset(24)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.accelerator.prepare_model = lambda model, **kwargs: model  # no DDP
    trainer.train()
    leave_results(directory, trainer)


SCENARIOS = {
    f"fsdp/{scenario.__name__}": scenario
    for scenario in (
        watched,
        resumed,
        replicas,
        blocked,
        at_once,
        ledger,
        layers,
        checkpointed,
        plain,
        dropped,
        refused,
        memory,
        mixed,
    )
}
