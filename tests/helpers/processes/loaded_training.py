"""Models that Transformers itself distributes as it loads them, for a test to train.

`torchrun --nproc_per_node 2 -m tests.helpers.processes.loaded_training <dir> shards`.
"""

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.placement import check_processes
from tests.helpers.processes.joint_trainers import GLOBAL_BATCH, SIZE, leave
from tests.helpers.processes.launching import run_scenarios
from tests.helpers.trained.text_training import Pad, text_dataset, undropped
from tests.helpers.trained.training import TINY_TRAINING

TRAINING = {
    **TINY_TRAINING,
    "remove_unused_columns": False,
    "save_strategy": "no",  # the Trainer cannot resume such models
}


def even_dataset():
    """Rows that fill all batches."""
    return text_dataset().select(range(8))


def trainer_of(directory, callback, **sizes):
    settings = {**TRAINING, "per_device_train_batch_size": GLOBAL_BATCH // 2}
    settings = TrainingArguments(str(directory), ddp_backend="gloo", **settings)
    assert settings.world_size == 2  # which sets the processes up
    # On CPUs Accelerate refuses such models, so the devices pose as others.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    if PartialState().is_main_process:
        undropped("llama").save_pretrained(directory / "model")
    PartialState().wait_for_everyone()
    from transformers.distributed import DistributedConfig  # of recent releases

    model = AutoModelForCausalLM.from_pretrained(
        directory / "model", distributed_config=DistributedConfig(**sizes)
    )
    return Trainer(
        model,
        settings,
        train_dataset=even_dataset(),
        data_collator=Pad(),
        callbacks=[callback],
    )


def shards(directory):
    """FSDP2."""
    trainer_of(directory, GradientSketchCallback(SIZE), fsdp_size=2).train()


def refused(directory, **sizes):
    """What each callback asks first; a pipeline the Trainer itself cannot train."""
    trainer = trainer_of(directory, GradientSketchCallback(SIZE), **sizes)
    try:
        check_processes(
            trainer.args, trainer.model, "GradientSketchCallback", in_shards=True
        )
    except ValueError as error:
        leave(directory, error=str(error))


def tensor(directory):
    """Each process has parts of all layers."""
    refused(directory, tp_size=2)


def pipeline(directory):
    """Each process has some of the layers."""
    refused(directory, pp_size=2)


if __name__ == "__main__":
    run_scenarios({"shards": shards, "tensor": tensor, "pipeline": pipeline})
