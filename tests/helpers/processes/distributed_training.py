"""Training in several processes by DDP: scenarios of tests/processes."""

import gc
from pathlib import Path

import torch
from accelerate.state import PartialState
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from hf_sketch import SubspaceConfig
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.processes import end_group
from tests.helpers.processes.joint_trainers import (
    GLOBAL_BATCH,
    SIZE,
    Notes,
    even,
    exchanged_sizes,
    leave,
    stopped,
    train,
    trainer_of,
)
from tests.helpers.trained.text_training import Pad, text_dataset, undropped
from tests.helpers.trained.training import tiny_dataset, undropped_bert

OWN_BATCHES = {"dispatch_batches": False}


class Gate(nn.Module):
    """A head of which processes use parts of their own, and one is not used at all."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(32, 3) for _ in range(4))

    def forward(self, x):
        return self.heads[0](x) + self.heads[1 + PartialState().process_index](x)


def divides(directory):
    """No row is left over."""
    train(directory, GradientSketchCallback(SIZE), **even())


def plain(directory):
    train(directory)


def watched(directory):
    notes = Notes()
    with exchanged_sizes() as exchanged:
        train(directory, notes, GradientSketchCallback(SIZE))
    leave(directory, seen=notes.seen, exchanged=exchanged)
    torch.save(notes.gradients, directory / "gradients.pt")


def twice(items):
    """A batch with two rows of each example, all of them first and then all again."""
    batch = {name: torch.tensor([x[name] for x in items * 2]) for name in items[0]}
    batch["labels"] = batch.pop("label")
    batch["input_ids"][len(items) :, 1:] += 1
    batch["attention_mask"][:] = 1
    return batch


def pairs(directory):
    """One process's second batch consists of examples that were used before."""
    trainer = trainer_of(
        directory,
        GradientSketchCallback(SIZE),
        rows=6,
        gradient_accumulation_steps=1,
        save_strategy="no",
    )
    trainer.train_dataset = trainer.train_dataset.remove_columns("text")
    trainer.data_collator = twice
    trainer.train()


def interrupted(directory):
    """As watched, with an interruption."""
    stopped(directory)
    train(directory, GradientSketchCallback(SIZE), resume=True)


def ledger(directory):
    """With rows of updates, interrupted and resumed."""
    settings = {"updates": True, "per_example": False}
    callback = GradientSketchCallback(SIZE, **settings)
    stopped(directory, callback)
    train(directory, GradientSketchCallback(SIZE, **settings), resume=True)


def left(directory):
    """Interrupted, for another number of processes to go on."""
    stopped(directory, **even())


def continued(directory):
    """Goes on where another number of processes was interrupted."""
    callback = GradientSketchCallback(SIZE)
    train(directory, callback, **even(), resume=True)


def widened(directory):
    """It is not gone on with in steps of other numbers of examples."""
    settings = {**even(), "per_device_train_batch_size": GLOBAL_BATCH}
    train(directory, GradientSketchCallback(SIZE), **settings, resume=True)


def padded(directory, **arguments):
    """The last batch lacks a row; the weights stay as they are."""
    settings = {"rows": 21, "model": undropped_bert(), "learning_rate": 0.0}
    train(directory, GradientSketchCallback(SIZE), **{**settings, **arguments})


def split(directory):
    """The same, where processes share each batch."""
    padded(
        directory,
        per_device_train_batch_size=GLOBAL_BATCH,
        accelerator_config={"split_batches": True},
    )


def grouped(directory):
    notes = Notes()
    callback = GradientSketchCallback(SIZE)
    train(directory, notes, callback, train_sampling_strategy="group_by_length")
    leave(directory, seen=notes.seen)


def rarely(directory):
    """The first step that is verified is one with filled up batches."""
    train(directory, GradientSketchCallback(SIZE, every_steps=3))


def tokens(directory, **arguments):
    """The loss is a mean over the tokens of all processes."""
    settings = {"remove_unused_columns": False, "learning_rate": 0.0}
    trainer = trainer_of(
        directory,
        GradientSketchCallback(SIZE),
        model=undropped("gpt2"),
        **{"dataset": text_dataset(), **settings, **arguments},
    )
    trainer.data_collator = Pad()
    trainer.train()


def stream(directory):
    """Each process has a shard of its own."""
    tokens(
        directory,
        dataset=text_dataset().to_iterable_dataset(num_shards=2),
        accelerator_config=OWN_BATCHES,
        max_steps=2,
        gradient_accumulation_steps=1,
    )


def unused(directory):
    """Parameters without a gradient in one process, or in all."""
    model, notes = undropped_bert(), Notes()
    model.classifier = Gate()
    callback = GradientSketchCallback(SIZE)
    train(directory, notes, callback, model=model, ddp_find_unused_parameters=True)
    torch.save(notes.gradients, directory / "gradients.pt")


def ended(directory):
    """The end of a program: a wrapped model that nothing but itself holds."""
    gc.disable()
    trainer = trainer_of(directory, max_steps=1)
    trainer.train()
    trainer.model_wrapped.owner = trainer
    for _ in range(20):  # the group's threads ask for the interpreter as they end
        work = distributed.all_reduce(torch.ones(9), async_op=True)
        work.get_future().then(lambda _: sum(range(2000)))
    del trainer, work
    end_group()
    gc.enable()
    tasks = Path("/proc/self/task").glob("*/comm")  # none where the system has no such
    leave(directory, threads=[path.read_text().strip() for path in tasks])
    # A group for the scenarios that follow; torchrun's own store has the first one's.
    store = f"file://{directory}/group"
    rank, processes = PartialState().process_index, PartialState().num_processes
    distributed.init_process_group("gloo", store, rank=rank, world_size=processes)


def subspace_settings():
    """An adapter of 32 dimensions, and rows that fill all batches."""
    settings = even()
    config = SubspaceConfig(dim=32, seed=1)
    model = get_peft_model(settings.pop("model"), config)
    dataset = tiny_dataset(settings.pop("rows"))
    return {**settings, "model": model, "dataset": dataset, "learning_rate": 1e-2}


def subspace(directory):
    """omega alone is exchanged: the hook sees what DDP would all-reduce."""
    exchanged = []

    class Exchange(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            def note(group, bucket):
                exchanged.append([p.numel() for p in bucket.parameters()])
                return allreduce_hook(group, bucket)

            trainer.model_wrapped.register_comm_hook(None, note)

    trainer = trainer_of(directory, Exchange(), **subspace_settings())
    trainer.train()
    rank = PartialState().process_index
    leave(directory, exchanged=exchanged)
    torch.save(trainer.model.state_dict(), directory / f"weights-{rank}.pt")


SCENARIOS = {
    f"ddp/{scenario.__name__}": scenario
    for scenario in (
        plain,
        watched,
        pairs,
        interrupted,
        divides,
        ledger,
        padded,
        left,
        grouped,
        rarely,
        tokens,
        stream,
        unused,
        subspace,
        continued,
        split,
        widened,
        ended,
    )
}
