"""Which placements of a model and its training the callbacks support."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_sketch.model.fsdp import in_row_shards

_PARALLELISMS = {
    "tensor": "tp_size",
    "pipeline": "pp_size",
    "expert": "ep_size",
    "context": "cp_size",
    "sequence": "sp_size",
}
_SHARDED = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
)


def check_processes(
    args: TrainingArguments,
    model: nn.Module,
    callback: str,
    *,
    compiled: bool = False,
    in_shards: bool = False,
) -> None:
    """Raise unless every process trains the whole model, and as it is.

    Args:
        args: settings of the Trainer.
        model: the model that it trains.
        callback: name of the callback that needs this.
        compiled: whether the model may be compiled.
        in_shards: whether FSDP2 may have split the parameters, and DeepSpeed may train.

    Raises:
        ValueError: the callback does not support the Trainer's settings, or the model.
    """
    kind = AcceleratorState().distributed_type
    trainable = [p for p in model.parameters() if p.requires_grad]
    split = in_shards and bool(trainable) and in_row_shards(trainable)
    refused = {
        "several GPUs in one process (start one process per GPU with `accelerate "
        "launch`, or set CUDA_VISIBLE_DEVICES=0)": args.n_gpu > 1,
        "torch_compile=True": args.torch_compile and not compiled,
        _sharding(kind, in_shards): kind in _SHARDED and not split,
        "several processes of torch_xla": kind == DistributedType.XLA
        and args.world_size > 1,
        "parameters in parts": not split
        and any(type(p.data) is not Tensor for p in trainable),
        "parameters on several devices": len({p.device for p in trainable}) > 1,
        **dict.fromkeys(_parallelisms(model), True),
    }
    found = [name for name, present in refused.items() if name and present]
    if found:
        raise ValueError(
            f"{callback} does not support {', '.join(found)}. Train without, or remove "
            "the callback."
        )


def _sharding(kind: DistributedType, in_shards: bool) -> str:
    """Return what is refused of this kind of processes; "" if nothing is.

    Under DeepSpeed modules have whole parameters for as long as they run.
    """
    if kind == DistributedType.DEEPSPEED and in_shards:
        return ""
    version = " of version 1" if in_shards and kind == DistributedType.FSDP else ""
    return f"{kind.value}{version}"


def _parallelisms(model: nn.Module) -> list[str]:
    """The ways in which processes share examples, or layers, of this model."""
    # As set for Accelerate, or as the model was loaded; older releases have neither.
    prepared = getattr(AcceleratorState(), "parallelism_config", None)
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    return [
        f"{way} parallelism"
        for way, size in _PARALLELISMS.items()
        if any((getattr(x, size, None) or 1) > 1 for x in (prepared, loaded))
    ]


def step_examples(args: TrainingArguments, state: TrainerState) -> int:
    """Return the number of examples per optimizer step, over all processes."""
    found = state.train_batch_size if args.auto_find_batch_size else None
    examples = found or args.train_batch_size
    settings = args.accelerator_config
    assert isinstance(settings, AcceleratorConfig)  # what TrainingArguments make of it
    processes = 1 if settings.split_batches else PartialState().num_processes
    return examples * processes * args.gradient_accumulation_steps
