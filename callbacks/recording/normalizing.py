"""The second moments by which a run's gradients are divided."""

from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments

from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.normalizer import Normalizer
from hf_sketch.processes import check_same
from hf_sketch.store.header import HEADER, Header, read_header


def normalized(
    header: Header,
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: Optimizer,
) -> Header:
    """Return a header whose map divides gradients by Adam's second moments.

    A store that is resumed keeps its own: all its rows are of one map.

    Raises:
        ValueError: the optimizer has no second moments, the model is in shards, or
            processes have different ones.
    """
    if args.deepspeed or in_row_shards(model.parameters()):
        raise ValueError(
            "normalize='adam' does not support FSDP or DeepSpeed, where no process has "
            "all second moments. Train under DDP, or leave normalize out."
        )
    normalizer = _recorded(args) if state.global_step else None
    if normalizer is None:
        normalizer = Normalizer.from_optimizer(model, optimizer)
    check_same("GradientSketchCallback", {"normalizer": normalizer.digest})
    sketch = replace(header.model_sketch, normalizer=normalizer)
    return replace(header, model_sketch=sketch)


def _recorded(args: TrainingArguments) -> Normalizer | None:
    """Return the normalizer of the store beside the checkpoints, if there is one."""
    directory = Path(args.output_dir or ".") / "sketches"
    if not (directory / HEADER).exists():
        return None
    return read_header(directory).model_sketch.normalizer
