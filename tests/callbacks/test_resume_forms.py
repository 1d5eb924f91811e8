"""Every way to go on training: each row has the id of the example that was seen."""

import shutil

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.header import read_header
from tests.helpers.rows import rows_of
from tests.helpers.trained.training import Interrupt, tiny_dataset, tiny_trainer

SIZE = 64


class Seen(TrainerCallback):
    """Record which examples each step's batches hold, by their first tokens."""

    def __init__(self):
        self.ids = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.step = state.global_step + 1
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if module.training:
            ids = (kwargs["input_ids"][:, 0] - 1).tolist()
            self.ids.setdefault(self.step, []).extend(ids)

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def run(tmp_path, *callbacks, resume=None, **arguments):
    seen = Seen()
    sketching = GradientSketchCallback(SIZE)
    trainer = tiny_trainer(tmp_path, sketching, seen, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return seen.ids


def interrupted(tmp_path, step, **arguments):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupt(step), **arguments)


def recorded(tmp_path):
    rows = load_sketches(tmp_path).dataset
    ids = {}
    for step, example in zip(rows["step"][:], rows["example_id"][:], strict=True):
        ids.setdefault(step, []).append(example)
    return ids


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run(directory) == recorded(directory)
    return load_sketches(directory)


def assert_complete(tmp_path, uninterrupted):
    store = load_sketches(tmp_path)
    assert store.dataset[:] == uninterrupted.dataset[:]
    assert store.steps[:] == uninterrupted.steps[:]


def test_after_rotation(tmp_path, uninterrupted):
    interrupted(tmp_path, 5, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    run(tmp_path, resume=True, save_total_limit=1)
    assert_complete(tmp_path, uninterrupted)


def test_with_the_best_model_at_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    seen = run(tmp_path, eval_dataset=tiny_dataset(4), **settings)
    assert recorded(tmp_path) == seen
    assert len(load_sketches(tmp_path).steps) == 6


def test_without_skipping_data(tmp_path):
    interrupted(tmp_path, 5)
    seen = run(tmp_path, resume=True, ignore_data_skip=True)
    ids = recorded(tmp_path)
    assert min(seen) == 5
    assert {step: ids[step] for step in seen} == seen


@pytest.mark.filterwarnings("ignore:.*per_device_train_batch_size.*:UserWarning")
def test_with_another_batch_size(tmp_path):
    interrupted(tmp_path, 3)
    seen = run(tmp_path, resume=True, per_device_train_batch_size=2)
    ids = recorded(tmp_path)
    assert min(seen) == 3
    assert {step: ids[step] for step in seen} == seen
    assert read_header(tmp_path / "sketches").step_examples == 4


@pytest.mark.parametrize("rows", [18, pytest.param(26, marks=pytest.mark.full)])
def test_in_the_second_epoch_after_a_last_step_of_fewer_batches(tmp_path, rows):
    """Five or seven batches per epoch, two per step."""
    settings = {"dataset": tiny_dataset(rows)}
    seen = run(tmp_path / "whole", **settings)
    last = max(seen)
    assert [len(seen[step]) for step in (last // 2, last)] == [2, 2]
    interrupted(tmp_path / "resumed", last - 1, **settings)
    again = run(tmp_path / "resumed", resume=True, **settings)
    assert min(again) == last - 1 > last // 2 + 1
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "resumed") == seen
    assert_complete(tmp_path / "resumed", load_sketches(tmp_path / "whole"))


class OutOfMemory(TrainerCallback):
    """Fails as the memory does, the first time."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.filterwarnings("ignore:.*rows up to step.*not resumed:UserWarning")
def test_with_a_batch_size_that_is_found(tmp_path, step):
    seen = Seen()
    trainer = tiny_trainer(
        tmp_path,
        GradientSketchCallback(SIZE),
        seen,
        OutOfMemory(step),
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    trainer.train()
    rows = load_sketches(tmp_path).dataset
    last = {
        key: ids[-count:]
        for key, ids in seen.ids.items()
        if (count := rows["step"][:].count(key))
    }
    assert recorded(tmp_path) == last
    assert len(rows) == 2 * 22
    assert read_header(tmp_path / "sketches").step_examples == trainer._train_batch_size


def test_from_a_checkpoint_after_the_store_was_lost(tmp_path, uninterrupted):
    interrupted(tmp_path, 5)
    shutil.rmtree(tmp_path / "sketches")
    run(tmp_path, resume=True)
    rows = load_sketches(tmp_path).dataset.with_format("torch")[:]
    expected = uninterrupted.dataset.with_format("torch")[:]
    later = expected["step"] > 4
    assert torch.equal(rows["example_id"], expected["example_id"][later])
    assert torch.equal(rows["sketch"], expected["sketch"][later])


def test_with_the_map_of_a_store_of_an_earlier_default(tmp_path):
    """Without a layout the store's own is used, and a new store gets the default."""
    whole = tmp_path / "whole"
    tiny_trainer(whole, GradientSketchCallback(SIZE, layout="factored")).train()
    callbacks = GradientSketchCallback(SIZE, layout="factored"), Interrupt(4)
    directory = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(directory, *callbacks).train()
    trainer = tiny_trainer(directory, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=True)
    assert rows_of(directory) == rows_of(whole)
    new = tmp_path / "new"
    tiny_trainer(new, GradientSketchCallback(SIZE), max_steps=1).train()
    assert read_header(new / "sketches").model_sketch.layout == "grouped"
