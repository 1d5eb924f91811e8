"""If recording fails, the error is clear, and training's own work is not touched."""

import gc
import os
import resource
import weakref

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import ExampleSketcher, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.durable import Draft
from hf_sketch.model.group_sum import GroupSum
from tests.helpers.trained.training import tiny_trainer

SIZE = 64


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer = tiny_trainer(directory, GradientSketchCallback(SIZE))
    trainer.train()
    return load_sketches(directory), curve(trainer)


def curve(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class FullDisk(TrainerCallback):
    """The disk is full from the third step on, after some more syncs of files."""

    def __init__(self, monkeypatch, syncs=0):
        self.monkeypatch, self.left = monkeypatch, syncs
        self.fsync = os.fsync

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.monkeypatch.setattr(os, "fsync", self.sync)

    def sync(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        self.fsync(descriptor)


class Hidden(TrainerCallback):
    """Puts a file where the store was, after a step."""

    def __init__(self, directory, step):
        self.directory = directory
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            store = self.directory / "sketches"
            store.rename(self.directory / "moved")
            store.write_text("not a directory")


def assert_checkpoints_are_intact(tmp_path, uninterrupted, monkeypatch):
    """Resuming ends with the rows and the losses of a run that never failed."""
    monkeypatch.undo()
    store, losses = uninterrupted
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=True)
    assert curve(trainer) == losses
    got = load_sketches(tmp_path)
    assert got.dataset[:] == store.dataset[:]
    assert got.steps[:] == store.steps[:]


@pytest.mark.parametrize(
    "syncs", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2, 3))]
)
def test_a_full_disk_stops_training_with_a_clear_error(
    tmp_path, uninterrupted, monkeypatch, syncs
):
    """Whichever file of a flush is the first that does not fit."""
    full = FullDisk(monkeypatch, syncs)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), full)
    message = r"No space left on device\)\. Free disk space and resume from"
    with pytest.raises(OSError, match=message):
        trainer.train()
    with pytest.warns(UserWarning, match="no rows from step 3 on .*disk was full"):
        assert len(load_sketches(tmp_path).steps) == 2
    assert trainer.state.global_step == 4
    assert_checkpoints_are_intact(tmp_path, uninterrupted, monkeypatch)


def test_training_may_go_on_without_rows(tmp_path, uninterrupted, monkeypatch):
    callback = GradientSketchCallback(SIZE, on_error="warn")
    trainer = tiny_trainer(tmp_path, callback, FullDisk(monkeypatch))
    with pytest.warns(UserWarning, match="Recording stopped: .*space.*continues"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert curve(trainer) == uninterrupted[1]
    assert not any(m._forward_hooks for m in trainer.model.modules())
    with pytest.warns(UserWarning, match="no rows from step 3 on .*disk was full"):
        assert len(load_sketches(tmp_path).steps) == 2


def test_the_store_says_where_recording_was_off(tmp_path, monkeypatch):
    callback = GradientSketchCallback(SIZE, on_error="warn")
    trainer = tiny_trainer(tmp_path, callback)
    plain = GroupSum.add_outer
    calls = [0]

    def add(self, name, left, right):
        calls[0] += 1
        if calls[0] > 120:
            raise torch.OutOfMemoryError("the device is full")
        plain(self, name, left, right)

    monkeypatch.setattr(GroupSum, "add_outer", add)
    with pytest.warns(UserWarning, match=r"stopped: .*did not fit into memory .*full"):
        trainer.train()
    assert trainer.state.global_step == 6
    with pytest.warns(UserWarning, match=r"no rows from step \d on .*MemoryError"):
        store = load_sketches(tmp_path)
    steps = set(store.dataset["step"][:])
    assert steps == set(range(1, len(steps) + 1))
    assert len(steps) < 6
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    monkeypatch.undo()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.warns(UserWarning, match="no rows from step"):
        store = load_sketches(tmp_path)
    assert {5, 6} <= set(store.dataset["step"][:])


def test_memory_that_runs_out_in_a_hook_is_an_error_of_ours(tmp_path, monkeypatch):
    def add(self, name, left, right):
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(GroupSum, "add_outer", add)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    with (
        pytest.warns(UserWarning, match="were not compared with those of single"),
        pytest.raises(MemoryError, match=r"\(the device is full\): pass layout="),
    ):
        trainer.train()


def test_a_step_without_memory_leaves_nothing_behind(tmp_path, monkeypatch):
    def add(self, name, left, right):
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(GroupSum, "add_outer", add)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE, on_error="warn"))
    with (
        pytest.warns(UserWarning, match="were not compared with those of single"),
        pytest.warns(UserWarning, match="did not fit into memory"),
    ):
        trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None


class RowsInMemory(TrainerCallback):
    """Counts the rows in memory after each step, without those from before."""

    def __init__(self):
        self.counts = []
        self.before = self.rows()

    def rows(self):
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return {id(x): x for x in tensors if x.shape[1:] == (SIZE,)}

    def on_step_end(self, args, state, control, **kwargs):
        new = self.rows().keys() - self.before.keys()
        self.counts.append(len(new))


def test_no_rows_stay_in_memory_when_recording_has_stopped(tmp_path, monkeypatch):
    """Neither those that were to be written nor those that were to be measured."""
    plain = ExampleSketcher.take
    taken = []

    def take(self, *args):
        taken.append(None)
        if len(taken) == 2:
            raise torch.OutOfMemoryError("the device is full")
        return plain(self, *args)

    monkeypatch.setattr(ExampleSketcher, "take", take)
    rows = RowsInMemory()
    recording = GradientSketchCallback(SIZE, on_error="warn")
    trainer = tiny_trainer(tmp_path, recording, rows)
    with pytest.warns(UserWarning, match="Recording stopped: .*the device is full"):
        trainer.train()
    assert rows.counts == [0] * 6


def test_a_directory_that_is_gone_stops_training_with_a_clear_error(
    tmp_path, monkeypatch
):
    hidden = Hidden(tmp_path, 3)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), hidden)
    with pytest.raises(OSError, match=r"Not a directory.*Free disk space"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert len(load_sketches(tmp_path / "moved").steps) == 2


def test_a_file_that_the_system_cuts_is_never_named(tmp_path):
    """A limit on the size of files, which a shard passes and a checkpoint does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(16384))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*Free disk space"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.warns(UserWarning, match="no rows from step 1 on .*File too large"):
        store = load_sketches(tmp_path)
    assert len(store.dataset) == len(store.steps) == 0
    assert not list((tmp_path / "sketches").glob("*.tmp"))


class StaysFull(FullDisk):
    """The disk is full from the third step on, and has no room for a single byte."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.monkeypatch.setattr(Draft, "__init__", self.sync)
            self.monkeypatch.setattr("hf_sketch.store.log.append_file", self.sync)

    def sync(self, *_):
        raise OSError(28, "No space left on device")


def test_a_disk_that_stays_full_is_named_on_opening(tmp_path, monkeypatch):
    """Also where the manifest has no room for a line; the next one lists the gap."""
    callback = GradientSketchCallback(SIZE, on_error="warn")
    trainer = tiny_trainer(tmp_path, callback, StaysFull(monkeypatch))
    with pytest.warns(UserWarning, match="Recording stopped"):
        trainer.train()
    monkeypatch.undo()
    message = r"no rows from step 3 on .*the disk was full"
    with pytest.warns(UserWarning, match=message):
        assert len(load_sketches(tmp_path).steps) == 2
    resumed = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not list((tmp_path / "sketches").glob("*.full"))
    with pytest.warns(UserWarning, match=message):
        assert load_sketches(tmp_path).steps["step"][:] == [1, 2, 5, 6]
