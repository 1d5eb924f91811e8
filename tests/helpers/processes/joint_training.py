"""Spectra and searches in several processes: scenarios of tests/processes."""

import torch
from accelerate.state import PartialState
from peft import get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

import hf_sketch.spectra.files as spectrum_files
from hf_sketch import SubspaceConfig
from hf_sketch.callbacks import HessianSpectrumCallback, IntrinsicDimensionCallback
from tests.helpers.processes.joint_trainers import even, leave, train, trainer_of
from tests.helpers.trained.text_training import Pad, text_dataset, undropped
from tests.helpers.trained.training import Interrupt, tiny_dataset

STEPS = (0, 2, 3)
SHORT = {"max_steps": 3, "save_steps": 1}


def spectra_of(steps=STEPS, **options):
    """A callback that is quick; three batches, of which some process has more."""
    settings = {"batches": 3, "batch_size": 4, "krylov_dim": 6, "out_size": 64}
    return HessianSpectrumCallback(steps, **{**settings, "keep_vectors": 4, **options})


class Weights(TrainerCallback):
    """Writes the weights that spectra are taken of."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_begin(self, args, state, control, model, **kwargs):
        if state.is_world_process_zero:
            torch.save(model.state_dict(), self.directory / f"at-{state.global_step}")

    on_step_end = on_train_begin


class Logs(TrainerCallback):
    """Keeps what the history has of spectra."""

    def on_train_end(self, args, state, control, **kwargs):
        self.logs = [e for e in state.log_history if "curvature_rneg" in e]


class FailsAt:
    """A loss that raises at its call of a number, in some processes."""

    def __init__(self, error, call, ranks):
        self.error, self.left = error, call
        self.fails = PartialState().process_index in ranks

    def __call__(self, output, inputs):
        self.left -= 1
        if self.fails and self.left == 0:
            raise self.error
        return output.loss


def plain(directory):
    train(directory, **SHORT)


def spectra(directory):
    """A classifier with dropout; each process notes what is logged."""
    notes = Logs()
    train(directory, Weights(directory), notes, spectra_of(), **SHORT)
    leave(directory, logs=notes.logs)


def weighted(directory, **options):
    """A language model, whose batches have different numbers of tokens."""
    trainer = trainer_of(
        directory,
        Weights(directory),
        spectra_of(**options),
        model=undropped("gpt2"),
        dataset=text_dataset(),
        remove_unused_columns=False,
        **SHORT,
    )
    trainer.data_collator = Pad()
    trainer.train()


def differences(directory):
    weighted(directory, mode="finite_difference")


def resumed(directory):
    """As `spectra`, with an interruption."""
    try:
        train(directory, spectra_of(), Interrupt(2), **SHORT)
    except KeyboardInterrupt:
        PartialState().wait_for_everyone()
    train(directory, spectra_of(batches=1), resume=True, **SHORT)


def unlabelled(directory):
    """Of two batches, the first process has the one without any label."""
    batch = Pad()([text_dataset()[row] for row in range(4)])
    batch = {name: torch.as_tensor(value) for name, value in batch.items()}
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    weighted(directory, batches=[without, batch])


def failing(directory):
    """The last process fails in a product, later the first one on writing."""
    error = torch.OutOfMemoryError("the device is full")
    loss_fn = FailsAt(error, 12, [PartialState().num_processes - 1])
    replace_file = spectrum_files.replace_file

    def full(path, data):
        if path.name.startswith("step-00000002"):
            raise OSError(28, "No space left on device")
        replace_file(path, data)

    spectrum_files.replace_file = full
    train(directory, spectra_of(loss_fn=loss_fn, batch_size=1), **SHORT)
    spectrum_files.replace_file = replace_file


def unwritable(directory):
    """The first process cannot make the directory."""
    if PartialState().is_main_process:
        (directory / "curvature").write_text("a file where the directory should be")
    train(directory, spectra_of(), **SHORT)


def broken(directory):
    """The last process raises what no callback expects."""

    class OddError(Exception):
        pass

    last = PartialState().num_processes - 1
    loss_fn = FailsAt(OddError("an odd end"), 6, [last])
    train(directory, spectra_of((0,), loss_fn=loss_fn), **SHORT)


SEARCH = {"target": 0.2, "metric": "eval_loss", "greater_is_better": False}
SEARCH |= {"stage_steps": 4, "min_improvement": 0.003}


def search_settings(**config):
    """A subspace of float64 that grows, and rows that fill all batches."""
    settings = even()
    model = settings.pop("model").double()
    adapter = SubspaceConfig(dim=4, max_dim=64, seed=1, **config)
    dataset = tiny_dataset(settings.pop("rows"))
    return {
        **settings,
        "model": get_peft_model(model, adapter),
        "dataset": dataset,
        "eval_dataset": dataset,
        "learning_rate": 1e-2,
        "max_steps": 30,
        "save_steps": 3,
    }


class Exchanged(TrainerCallback):
    """Keeps the sizes of what DDP averages, by a communication hook."""

    def __init__(self):
        self.sizes = []

    def on_train_begin(self, args, state, control, **kwargs):
        sizes = self.sizes  # what DDP holds must not hold the Trainer, which holds it

        def note(group, bucket):
            sizes.append(sum(p.numel() for p in bucket.parameters()))
            return allreduce_hook(group, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, note)


def search(directory, *callbacks, resume=None, config=None, **options):
    callback = IntrinsicDimensionCallback(**{**SEARCH, **options})
    exchanged = Exchanged()
    settings = search_settings(**(config or {}))
    trainer = trainer_of(directory, callback, exchanged, *callbacks, **settings)
    exchanged.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    leave(directory, exchanged=exchanged.sizes)
    rank = PartialState().process_index
    torch.save(trainer.model.state_dict(), directory / f"weights-{rank}.pt")
    PartialState().wait_for_everyone()


HEAD = {"modules_to_save": ["classifier"]}
HEADED = {"start_dim": 8, "min_improvement": 0.05}


def search_with_a_head(directory):
    """It starts in more dimensions than the adapter has, and trains a head too."""
    search(directory, config=HEAD, **HEADED)


def search_resumed(directory):
    """As `search`, with an interruption after a doubling."""
    try:
        search(directory, Interrupt(13))
    except KeyboardInterrupt:
        PartialState().wait_for_everyone()
    search(directory, resume=True)


def search_unwritable(directory):
    """The first process cannot write the second evaluation down."""

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            path = directory / "intrinsic_dimension.json"
            if state.is_world_process_zero and path.is_file():
                path.unlink()
                path.mkdir()

    try:
        search(directory, Gone())
    except (OSError, RuntimeError) as error:
        leave(directory, error=f"{type(error).__name__}: {error}")


def search_refused(directory):
    """A model that is compiled, and one that nothing averages the gradients of."""
    for name, arguments in (("compiled", {"torch_compile": True}), ("bare", {})):
        callback = IntrinsicDimensionCallback(**SEARCH)
        settings = {**search_settings(), **arguments}
        trainer = trainer_of(directory, callback, **settings)
        if name == "bare":
            trainer.accelerator.prepare_model = lambda model, **kwargs: model
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            leave(directory, **{name: str(error)})


def unlike(directory):
    """The last process has other settings: no spectra, and no search."""
    last = PartialState().is_last_process
    train(directory, spectra_of(krylov_dim=4 + last), **SHORT)
    try:
        search(directory, stage_steps=3 + last)
    except ValueError as error:
        leave(directory, error=str(error))


def search_broken(directory):
    """The last process raises what the others do not, after an evaluation."""

    class Broken(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step and PartialState().is_last_process:
                raise ArithmeticError("an odd end")

    search(directory, Broken())


SCENARIOS = {
    f"joint/{scenario.__name__}": scenario
    for scenario in (
        plain,
        spectra,
        weighted,
        differences,
        unlabelled,
        resumed,
        failing,
        unwritable,
        unlike,
        broken,
        search,
        search_with_a_head,
        search_resumed,
        search_unwritable,
        search_refused,
        search_broken,
    )
}
