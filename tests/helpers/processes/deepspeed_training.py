"""Training by DeepSpeed, and the same without it, in several processes."""

import math
from functools import partial
from importlib import import_module
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from datasets import Dataset
from transformers import Trainer

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.model.zero import whole_shape
from tests.helpers.processes.failing_trials import adapted
from tests.helpers.processes.joint_trainers import SIZE, even, train
from tests.helpers.trained.fused_models import IDS
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model
from tests.helpers.wrong_rules import wrong_first_factors

STAGES = (0, 1, 2, 3)
# With biases that layers pass on, a module of modules that is run again, and experts,
# whose gradients DeepSpeed reduces after the backward pass of their block.
FAMILIES = {"t5": {"dropout_rate": 0.0}, "vit": {}, "mixtral": {}}
SETTINGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
TRAINING = {"optim": "sgd", "learning_rate": 1e-2}
MICRO_BATCHES = (1, 2)  # in a step


def micro_batches_of(stage):
    """Without ZeRO, DeepSpeed divides gradients by their number, unlike the others."""
    return 2 if stage else 1


def in_stage(stage, watched, directory, **changes):
    """Clipped steps while the learning rate falls; every parameter is split."""
    split = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {**SETTINGS, "zero_optimization": split}
    callbacks = [GradientSketchCallback(SIZE)] if watched else []
    training = {**even(), **TRAINING, "deepspeed": settings, **changes}
    training["gradient_accumulation_steps"] = micro_batches_of(stage)
    train(directory, *callbacks, **training)
    rank = PartialState().process_index
    weights = {n: own_part(p, rank) for n, p in training["model"].named_parameters()}
    torch.save(weights, directory / f"parts-{rank}.pt")


def own_part(parameter, rank):
    """What a process holds of a parameter, less what fills up the last one's part."""
    part = getattr(parameter, "ds_tensor", parameter).detach().flatten()
    if part.numel() < math.prod(whole_shape(parameter)):
        part = part[: max(0, math.prod(whole_shape(parameter)) - rank * part.numel())]
    return part.clone()


def without(micro_batches, directory, **changes):
    """The same by DDP."""
    training = {**even(), **TRAINING, "gradient_accumulation_steps": micro_batches}
    training |= changes
    train(directory, GradientSketchCallback(SIZE), **training)


def of_family(name):
    """A model, with its examples several times."""
    inputs = {column: x.tolist() for column, x in tiny_inputs(name).items()}
    dataset = Dataset.from_dict(inputs).repeat(4)
    return {
        "model": tiny_model(name, torch.float32, **FAMILIES[name]).train(),
        "dataset": dataset,
    }


def family(name, watched, directory):
    in_stage(3, watched, directory, **of_family(name))


def family_without(name, directory):
    without(micro_batches_of(3), directory, **of_family(name))


def of_adapters():
    """Their first factors have no gradients yet, and soon some that count."""
    return {"model": adapted(), "learning_rate": 1.0}


def adapters(directory):
    """The rule of the first factors is wrong."""
    with wrong_first_factors():
        in_stage(3, True, directory, **of_adapters())


def adapters_without(directory):
    without(micro_batches_of(3), directory, **of_adapters())


def of_a_fused_head():
    """A model whose loss takes its head's weight and never calls the head."""
    model = tiny_model("llama", torch.float32, tie_word_embeddings=False).train()
    utils = import_module("trl.trainer.utils")
    utils.add_fused_lm_head(model)
    rows = Dataset.from_dict({"input_ids": IDS, "labels": IDS})
    return {"model": model, "dataset": rows.repeat(8)}


def of_log_probs(trainer, model, inputs, *_, **__):
    """The mean over tokens, as TRL's SFTTrainer computes it."""
    log_probs = model(**inputs, fused_lm_head=True).log_probs
    return -log_probs.sum() / (inputs["labels"][:, 1:] != -100).sum()


def of_model(trainer, model, inputs, *_, **__):
    """The same as the model computes it."""
    return model(**inputs, fused_lm_head=True).loss


FUSED_LOSSES = {"log_probs": of_log_probs, "loss": of_model}


def fused(loss, stage, watched, directory):
    """By DeepSpeed, or by DDP."""
    settings = of_a_fused_head()
    with patch.object(Trainer, "compute_loss", FUSED_LOSSES[loss]):
        if stage is None:
            without(micro_batches_of(3), directory, **settings)
        else:
            in_stage(stage, watched, directory, **settings)


SCENARIOS = {
    "deepspeed/fused-without": partial(fused, "log_probs", None, True),
    **{f"deepspeed/fused-{x}": partial(fused, x, 3, True) for x in FUSED_LOSSES},
    **{f"deepspeed/plain-{x}": partial(fused, x, 3, False) for x in FUSED_LOSSES},
    **{f"deepspeed/{name}": partial(family, name, True) for name in FAMILIES},
    **{f"deepspeed/plain-{name}": partial(family, name, False) for name in FAMILIES},
    **{f"deepspeed/without-{name}": partial(family_without, name) for name in FAMILIES},
    "deepspeed/adapters": adapters,
    "deepspeed/adapters-without": adapters_without,
    **{f"deepspeed/without-{n}": partial(without, n) for n in MICRO_BATCHES},
    **{f"deepspeed/{stage}": partial(in_stage, stage, True) for stage in STAGES},
    **{f"deepspeed/plain-{n}": partial(in_stage, n, False) for n in STAGES},
}
