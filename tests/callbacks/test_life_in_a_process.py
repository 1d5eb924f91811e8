"""The callback inside programs of others: interrupted, nested, copied, moved."""

import copy
import os
import pickle

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.training import (
    TINY_TRAINING,
    tiny_batch,
    tiny_bert,
    tiny_dataset,
    tiny_trainer,
)

SIZE = 64
SHORT = {"num_train_epochs": 1, "save_strategy": "no"}


class At(TrainerCallback):
    """Does something at an event, after some steps."""

    def __init__(self, event, act, step=1):
        self.act, self.step = act, step
        setattr(self, event, self.at)

    def at(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def hooks_of(model):
    modules = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]
    parameters = [
        hook
        for parameter in model.parameters()
        for hook in parameter._post_accumulate_grad_hooks or ()
    ]
    return modules + parameters


def raising(error):
    def act(*_, **__):
        raise error

    return act


def assert_usable(model):
    """No hook is left, and the model trains by hand."""
    assert hooks_of(model) == []
    model.train()
    for _ in range(3):
        model(**tiny_batch()).loss.backward()


@pytest.mark.parametrize(
    "event",
    ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"],
)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_error_between_passes_leaves_no_hook(tmp_path, event, kind):
    """Also while the error, and so every frame of training, is still held."""
    error = kind("stop")
    recording = GradientSketchCallback(SIZE)
    trainer = tiny_trainer(tmp_path, recording, At(event, raising(error)), **SHORT)
    with pytest.raises(kind, match="stop"):
        trainer.train()
    assert error.__traceback__ is not None
    assert_usable(trainer.model)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_error_within_a_pass_leaves_no_hook(tmp_path, place):
    model = tiny_bert()
    layer = model.bert.encoder.layer[1]
    if place == "forward":
        handle = layer.register_forward_hook(raising(KeyboardInterrupt("stop")))
    else:
        handle = layer.register_full_backward_hook(raising(KeyboardInterrupt("stop")))
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), model=model, **SHORT)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        trainer.train()
    handle.remove()
    assert_usable(model)


def test_training_goes_on_after_an_interruption_as_if_there_was_none(tmp_path):
    stop = At("on_step_begin", raising(KeyboardInterrupt("stop")))
    trainer = tiny_trainer(tmp_path / "again", GradientSketchCallback(SIZE), stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.model = trainer.model_wrapped = tiny_bert()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert "training_step" not in vars(trainer)
    plain = tiny_trainer(tmp_path / "plain", GradientSketchCallback(SIZE))
    plain.train()
    again, once = (load_sketches(tmp_path / name) for name in ("again", "plain"))
    assert again.steps["step"][:] == once.steps["step"][:]
    assert len(again.dataset) == len(once.dataset)


def test_steps_that_are_not_recorded_have_no_hooks(tmp_path):
    model, counts = tiny_bert(), []

    def count(module, args):
        counts.append(len(hooks_of(model)) > 1)

    model.register_forward_pre_hook(count)
    recording = GradientSketchCallback(SIZE, every_steps=2)
    tiny_trainer(tmp_path, recording, model=model, **SHORT).train()
    # Two batches a step; the second step's, and the pass that its rows are measured by.
    assert counts[:4] == [False, False, True, True]
    assert counts[-2:] == [False, False]


def test_two_callbacks_in_one_trainer_are_refused_as_it_is_built(tmp_path):
    callbacks = GradientSketchCallback(SIZE), GradientSketchCallback(SIZE, seed=1)
    with pytest.raises(ValueError, match=r"has 2 GradientSketchCallbacks, .* Keep one"):
        tiny_trainer(tmp_path, *callbacks)


def test_a_second_callback_that_is_added_later_is_refused(tmp_path):
    recording = GradientSketchCallback(SIZE)
    trainer = tiny_trainer(tmp_path, recording)
    trainer.add_callback(recording)
    with pytest.raises(ValueError, match="has 2 GradientSketchCallbacks"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "sketches").exists()


def test_one_callback_in_a_trainer_within_its_training_is_refused(tmp_path):
    recording = GradientSketchCallback(SIZE)

    def train_another():
        tiny_trainer(tmp_path / "inner", recording, **SHORT).train()

    inner = At("on_step_end", train_another)
    outer = tiny_trainer(tmp_path / "outer", recording, inner, **SHORT)
    with pytest.raises(ValueError, match=r"still records the training around .* Pass"):
        outer.train()


def test_a_trainer_within_training_has_rows_of_its_own(tmp_path):
    """By a callback of its own, while the outer one goes on."""

    def train_another():
        inner = GradientSketchCallback(SIZE)
        dataset = tiny_dataset(8)
        tiny_trainer(tmp_path / "inner", inner, dataset=dataset, **SHORT).train()

    recording = GradientSketchCallback(SIZE)
    act = At("on_step_end", train_another)
    tiny_trainer(tmp_path / "outer", recording, act, **SHORT).train()
    assert len(load_sketches(tmp_path / "outer").dataset) == 22
    assert len(load_sketches(tmp_path / "inner").dataset) == 8


def test_one_callback_records_one_trainer_after_another(tmp_path):
    recording = GradientSketchCallback(SIZE)
    for name in ("first", "second"):
        tiny_trainer(tmp_path / name, recording, **SHORT).train()
        assert len(load_sketches(tmp_path / name).dataset) == 22


def test_each_trial_of_a_search_has_rows_of_its_own(tmp_path):
    """One Trainer trains a new model each time, as `hyperparameter_search` does."""
    trainer = Trainer(
        model_init=lambda trial=None: tiny_bert(),
        args=TrainingArguments(str(tmp_path), **{**TINY_TRAINING, **SHORT}),
        train_dataset=tiny_dataset(),
        callbacks=[GradientSketchCallback(SIZE)],
    )
    trainer.train()
    first = load_sketches(tmp_path).dataset[:]
    with pytest.warns(UserWarning, match="Renamed .*sketches to sketches-before-1"):
        trainer.train()
    assert hooks_of(trainer.model) == []
    assert load_sketches(tmp_path).dataset[:] == first


def test_a_changed_working_directory_does_not_move_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    move = At("on_step_end", lambda: os.chdir("elsewhere"))
    tiny_trainer("out", GradientSketchCallback(SIZE), move, **SHORT).train()
    assert len(load_sketches(tmp_path / "out").dataset) == 22


def test_the_store_may_be_a_link_to_another_disk(tmp_path):
    output, disk = tmp_path / "out", tmp_path / "disk"
    output.mkdir()
    disk.mkdir()
    (output / "sketches").symlink_to(disk)
    tiny_trainer(output, GradientSketchCallback(SIZE), **SHORT).train()
    assert len(load_sketches(output).dataset) == 22
    assert (disk / "header.json").exists()
    with pytest.warns(UserWarning, match="Renamed .*disk to disk-before-1"):
        tiny_trainer(output, GradientSketchCallback(SIZE), **SHORT).train()
    assert (output / "sketches").is_symlink()
    assert (disk / "header.json").exists()


def after(event, tmp_path):
    """A Trainer that has not trained, was interrupted, or has trained."""
    recording = GradientSketchCallback(SIZE)
    trainer = tiny_trainer(tmp_path / "first", recording, **SHORT)
    if event == "an interruption":
        stop = At("on_pre_optimizer_step", raising(KeyboardInterrupt("stop")))
        trainer.add_callback(stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(stop)
    if event == "training":
        trainer.train()
    return trainer


@pytest.mark.parametrize("event", ["nothing", "an interruption", "training"])
def test_a_copy_of_a_trainer_records_its_own_rows(tmp_path, event):
    trainer = after(event, tmp_path)
    twin = copy.deepcopy(trainer)
    twin.args.output_dir = str(tmp_path / "twin")
    twin.train()
    assert len(load_sketches(tmp_path / "twin").dataset) == 22
    assert "training_step" not in vars(twin)


def test_a_training_step_that_was_replaced_before_is_kept(tmp_path):
    calls = []
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), **SHORT)

    def counted(*args):
        calls.append(args)
        return type(trainer).training_step(trainer, *args)

    trainer.training_step = counted
    trainer.train()
    assert len(calls) == len(set(load_sketches(tmp_path).dataset["step"])) * 2
    assert trainer.training_step is counted


def test_a_callback_is_pickled_without_its_run(tmp_path):
    recording = GradientSketchCallback(SIZE, seed=3)
    copies = []

    def pickled():
        copies.append(pickle.loads(pickle.dumps(recording)))

    act = At("on_step_end", pickled)
    tiny_trainer(tmp_path / "first", recording, act, **SHORT).train()
    tiny_trainer(tmp_path / "second", copies[0], **SHORT).train()
    first, second = (load_sketches(tmp_path / name) for name in ("first", "second"))
    assert first.dataset[:] == second.dataset[:]
