import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.rows import rows_of
from tests.helpers.trained.training import Interrupt, tiny_trainer

SIZE = 64


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    tiny_trainer(directory, GradientSketchCallback(SIZE)).train()
    return rows_of(directory)


def interrupted(directory, step, **arguments):
    trainer = tiny_trainer(
        directory, GradientSketchCallback(SIZE), Interrupt(step), **arguments
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize(
    "step", [4, *(pytest.param(step, marks=pytest.mark.full) for step in (3, 5, 6))]
)
def test_interrupted_and_resumed_rows_are_those_of_an_uninterrupted_run(
    tmp_path, step, uninterrupted
):
    interrupted(tmp_path, step)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=True)
    assert rows_of(tmp_path) == uninterrupted


def test_a_run_interrupted_before_anything_was_written_starts_again(
    tmp_path, uninterrupted
):
    interrupted(tmp_path, 1)
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE)).train()
    assert rows_of(tmp_path) == uninterrupted


def test_a_new_run_sets_the_rows_of_an_earlier_one_aside(tmp_path, uninterrupted):
    # At step 2 the rows are there, and the checkpoint is not.
    interrupted(tmp_path, 2)
    assert not any(tmp_path.glob("checkpoint-*"))
    for number in (1, 2):
        message = rf"Renamed .* to sketches-before-{number}: .* rows up to step \d"
        with pytest.warns(UserWarning, match=message):
            tiny_trainer(tmp_path, GradientSketchCallback(SIZE)).train()
        assert rows_of(tmp_path) == uninterrupted
    assert len(load_sketches(tmp_path / "sketches-before-1").steps) == 2
    assert len(load_sketches(tmp_path / "sketches-before-2").steps) == 6


def test_resuming_from_an_older_checkpoint_drops_the_later_rows(
    tmp_path, uninterrupted
):
    interrupted(tmp_path, 6)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rows_of(tmp_path) == uninterrupted


def test_rows_before_the_checkpoint_are_never_touched(tmp_path):
    interrupted(tmp_path, 5)
    shards = {
        path: path.read_bytes() for path in (tmp_path / "sketches").glob("*.arrow")
    }
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=True)
    assert len(shards) == 4  # two kinds at each of the checkpoints 2 and 4
    assert all(path.read_bytes() == content for path, content in shards.items())


def test_a_shard_across_the_checkpoint_is_cut(tmp_path, uninterrupted):
    # Without a checkpoint at step 2, one shard holds steps 1 to 4.
    interrupted(tmp_path, 5, save_steps=4)
    other = tmp_path / "other"
    interrupted(other, 3)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=str(other / "checkpoint-2"))
    assert rows_of(tmp_path) == uninterrupted


def test_a_checkpoint_from_before_the_callback_starts_a_store(tmp_path, uninterrupted):
    plain = tiny_trainer(tmp_path, Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        plain.train()
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    trainer.train(resume_from_checkpoint=True)
    steps = load_sketches(tmp_path).steps["step"]
    assert list(steps) == [3, 4, 5, 6]
    assert rows_of(tmp_path)[0] < uninterrupted[0]


def test_rows_are_there_before_their_checkpoint_is(tmp_path):
    seen = {}

    class Watching(GradientSketchCallback):
        def on_save(self, args, state, control, **kwargs):
            steps = load_sketches(tmp_path).steps["step"]
            seen[state.global_step] = max(steps)
            super().on_save(args, state, control, **kwargs)

    tiny_trainer(tmp_path, Watching(SIZE)).train()
    assert seen == {2: 2, 4: 4, 6: 6}


@pytest.mark.parametrize(
    "strategy",
    [
        {"save_strategy": "epoch"},
        pytest.param({"save_strategy": "no"}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_other_save_strategies_keep_all_rows(tmp_path, strategy, uninterrupted):
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE), **strategy).train()
    assert rows_of(tmp_path) == uninterrupted


def test_a_full_buffer_is_flushed_at_the_end_of_a_step(tmp_path, monkeypatch):
    import hf_sketch.callbacks.recording.sink as module

    def small(*args, **named):
        return SketchWriter(*args, **named, buffer_bytes=1, file_bytes=1)

    SketchWriter = module.SketchWriter
    monkeypatch.setattr(module, "SketchWriter", small)
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE), save_strategy="no").train()
    assert len(list((tmp_path / "sketches").glob("per_step-*.arrow"))) == 6
    assert torch.tensor(load_sketches(tmp_path).steps["step"][:]).tolist() == [
        *range(1, 7)
    ]
