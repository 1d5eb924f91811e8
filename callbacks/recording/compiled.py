"""Recorded steps of a model that torch compiles."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import TrainingArguments


def warn_of_cost(args: TrainingArguments) -> None:
    """Say what rows of examples cost a compiled model."""
    if args.torch_compile:
        warnings.warn(
            "Compiled graphs run no hooks, so recorded steps run uncompiled: they take "
            "as long as without torch_compile=True, and round otherwise. Pass a larger "
            "every_steps to record fewer steps, or per_example=False to run all of "
            "them compiled.",
            stacklevel=2,
        )


def uncompiled(args: TrainingArguments) -> AbstractContextManager[object]:
    """Return within what a compiled model runs as if it were not."""
    if not args.torch_compile:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
