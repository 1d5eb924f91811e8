"""Several processes record what one records with the same batches, once."""

import re
import shutil

import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.header import Header
from hf_sketch.store.log import read_manifests
from hf_sketch.store.writer import SketchWriter
from tests.helpers.processes.joint_trainers import GLOBAL_BATCH, SIZE, even
from tests.helpers.processes.launching import (
    ACCELERATE,
    assert_bit_equal_training,
    in_two_and_four,
    launch,
    results,
    run_together,
)
from tests.helpers.rows import assert_same_rows, columns, in_order
from tests.helpers.stores import SKETCH, step_row
from tests.helpers.trained.text_training import Pad, text_dataset, train, undropped
from tests.helpers.trained.training import Interrupt, tiny_dataset, tiny_trainer

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The store of the same training in one process."""
    directory = tmp_path_factory.mktemp("single")
    single_trainer(directory).train()
    return load_sketches(directory)


def single_trainer(directory, *callbacks, **arguments):
    callback, settings = GradientSketchCallback(SIZE), {**even(), **arguments}
    dataset = tiny_dataset(settings.pop("rows"))
    return tiny_trainer(directory, callback, *callbacks, dataset=dataset, **settings)


def assert_once(store, examples, epochs=2):
    """There is a row for each example in each epoch."""
    rows = columns(store.dataset)
    found = torch.stack([rows["epoch"], rows["example_id"]]).T.tolist()
    assert sorted(found) == [[e, i] for e in range(epochs) for i in range(examples)]


@in_two_and_four("ddp/divides")
def test_rows_are_those_of_one_process_with_the_same_batches(
    launched, processes, single
):
    store = load_sketches(launched / "divides")
    assert_same_rows(store, single)
    ranks = columns(store.dataset)["rank"]
    assert torch.bincount(ranks).tolist() == [48 // processes] * processes
    assert not list((launched / "divides" / "sketches").glob("per_step-*[1-9]-*.arrow"))
    assert store.measured_error.examples == min(3, 8 // processes)  # the first's
    assert store.measured_error.row_error < 1e-4


@pytest.mark.in_processes(2, "ddp/plain", "ddp/watched", "ddp/disk", "ddp/memory")
def test_training_is_bit_equal_with_and_without(launched):
    assert_bit_equal_training(launched, "watched", "disk", "memory")


@pytest.mark.in_processes(2, "ddp/watched")
def test_the_sum_of_the_first_rows_alone_is_exchanged(launched):
    for sizes in results(launched / "watched", "exchanged"):
        assert sizes == [SIZE]  # to verify it


@pytest.mark.in_processes(2, "ddp/watched", "ddp/grouped")
@pytest.mark.parametrize("scenario", ["watched", "grouped"])
def test_each_process_follows_the_examples_that_it_trains_on(launched, scenario):
    store = load_sketches(launched / scenario)
    rows = columns(store.dataset)
    for rank, seen in enumerate(results(launched / scenario, "seen")):
        own = rows["example_id"][rows["rank"] == rank].tolist()
        if rank == 1:  # its last batch of each epoch is filled up with two rows
            seen = [*seen[:10], *seen[12:22]]
        assert own == seen


@pytest.mark.in_processes(2, "ddp/watched", "ddp/unused")
@pytest.mark.parametrize("scenario", ["watched", "unused"])
def test_the_weighted_rows_of_all_processes_are_the_step_gradient(launched, scenario):
    store = load_sketches(launched / scenario)
    rows, steps = columns(store.dataset), columns(store.steps)
    gradients = torch.load(launched / scenario / "gradients.pt")
    assert_once(store, 22)
    for place, step in enumerate(steps["step"].tolist()):
        sketch = store.model_sketch.sketch(gradients[place])
        torch.testing.assert_close(steps["sketch"][place], sketch)
        own = rows["step"] == step
        total = rows["weight"][own].float() @ rows["sketch"][own]
        expected = sketch / steps["clip_factor"][place]
        distance = (total - expected).norm() / expected.norm()
        if step % 3:
            assert distance < 1e-5
        else:  # two of the step's eight examples are there for the second time
            assert distance > 1e-2
    expected = (0.5 / (steps["gradient_norm"] + 1e-6)).clamp(max=1.0)
    torch.testing.assert_close(steps["clip_factor"], expected)


@pytest.mark.in_processes(2, "ddp/pairs")
def test_a_batch_of_nothing_but_examples_that_were_used_before_has_no_rows(launched):
    store = load_sketches(launched / "pairs")
    assert_once(store, 6)
    assert len(store.steps) == 4


@in_two_and_four("ddp/padded")
def test_examples_that_fill_up_batches_have_no_row_and_count_in_the_step(
    launched, processes
):
    assert_filled(load_sketches(launched / "padded"))


def assert_filled(store):
    """Three of the 24 places of an epoch are filled with its first three examples."""
    assert_once(store, 21)
    rows, steps = columns(store.dataset), columns(store.steps)
    for place, step in enumerate(steps["step"].tolist()):
        own = rows["step"] == step
        total = rows["weight"][own].float() @ rows["sketch"][own]
        if step % 3 == 0:
            first = (rows["step"] == step - 2) & (rows["micro_step"] == 0)
            repeated = rows["sketch"][first][rows["rank"][first].argsort(stable=True)]
            total += rows["weight"][own][0] * repeated[:3].sum(0)
        expected = steps["sketch"][place] / steps["clip_factor"][place]
        assert (total - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.in_processes(2, "ddp/rarely")
def test_the_step_that_is_verified_may_have_filled_up_batches(launched):
    store = load_sketches(launched / "rarely")
    assert store.steps["step"][:] == [3, 6]
    assert torch.bincount(columns(store.dataset)["step"])[[3, 6]].tolist() == [6, 6]


@pytest.mark.in_processes(2, "ddp/watched", "ddp/interrupted")
def test_resumed_rows_are_those_of_an_uninterrupted_run(launched):
    resumed, store = (
        load_sketches(launched / name) for name in ("interrupted", "watched")
    )
    assert resumed.dataset[:] == store.dataset[:]
    assert resumed.steps[:] == store.steps[:]


@pytest.mark.in_processes(2, "ddp/ended")
def test_the_threads_of_a_group_end_with_it(launched):
    for names in results(launched / "ended", "threads"):
        assert "python" in "".join(names) or not names
        assert not any("gloo" in name for name in names)


@pytest.mark.in_processes(2, "ddp/left")
def test_one_process_resumes_what_two_began(launched, tmp_path, single):
    shutil.copytree(launched / "left", tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "checkpoint-4").exists()
    single_trainer(tmp_path).train(resume_from_checkpoint=True)
    store = load_sketches(tmp_path)
    assert_same_rows(store, single)
    rows = columns(store.dataset)
    assert set(rows["rank"][rows["step"] <= 4].tolist()) == {0, 1}
    assert set(rows["rank"][rows["step"] > 4].tolist()) == {0}


@pytest.mark.in_processes(2, "ddp/left")
def test_one_process_does_not_go_on_in_steps_of_other_numbers(launched, tmp_path):
    shutil.copytree(launched / "left", tmp_path, dirs_exist_ok=True)
    before = load_sketches(tmp_path).dataset[:]
    trainer = single_trainer(tmp_path, per_device_train_batch_size=GLOBAL_BATCH // 2)
    with pytest.raises(ValueError, match=r"2 processes with 8 .* 1 with 4,"):
        trainer.train(resume_from_checkpoint=True)
    assert load_sketches(tmp_path).dataset[:] == before


@pytest.mark.full
def test_two_processes_of_accelerate_resume_what_one_began(tmp_path, single):
    with pytest.raises(KeyboardInterrupt):
        single_trainer(tmp_path / "ddp" / "continued", Interrupt(5)).train()
    # Others take over a lock when the process that holds it is gone. This one goes on.
    (tmp_path / "ddp" / "continued" / "sketches-00000.lock").unlink()
    shutil.copytree(tmp_path / "ddp" / "continued", tmp_path / "ddp" / "widened")
    before = sorted((tmp_path / "ddp" / "widened" / "sketches").iterdir())
    scenarios = ["ddp/continued", "ddp/split"]
    launch(2, tmp_path, scenarios, launcher=ACCELERATE)
    store = load_sketches(tmp_path / "ddp" / "continued")
    assert_same_rows(store, single)
    rows = columns(store.dataset)
    assert set(rows["rank"][rows["step"] > 4].tolist()) == {0, 1}
    assert_filled(load_sketches(tmp_path / "ddp" / "split"))
    code, errors, _ = run_together(2, tmp_path, ["ddp/widened"])
    assert code != 0
    wanted = "1 processes with 8 examples per optimizer step, this run has 2 with 16"
    assert wanted in errors
    assert sorted((tmp_path / "ddp" / "widened" / "sketches").iterdir()) == before


@pytest.mark.in_processes(2, "ddp/tokens")
def test_losses_over_the_tokens_of_all_processes(launched, tmp_path):
    callback, model = GradientSketchCallback(SIZE, seed=7), undropped("gpt2")
    expected = train(tmp_path, model, text_dataset(), Pad(), [callback])
    alone = in_order(columns(expected.dataset))
    store = load_sketches(launched / "tokens")
    assert_once(store, 10)
    rows, steps = columns(store.dataset), columns(store.steps)
    for name in ("sketch", "loss"):
        expected = alone[name][rows["example_id"]]
        torch.testing.assert_close(rows[name], expected, rtol=1e-4, atol=1e-5)
    for place in (0, 2):  # steps of two whole rounds of batches
        own = rows["step"] == steps["step"][place]
        assert float(rows["weight"][own].sum()) == pytest.approx(1)
        total = rows["weight"][own].float() @ rows["sketch"][own]
        expected = steps["sketch"][place] / steps["clip_factor"][place]
        assert (total - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.in_processes(2, "ddp/stream")
def test_a_stream_with_a_shard_for_each_process(launched):
    rows = columns(load_sketches(launched / "stream").dataset)
    assert len(rows["example_id"].unique()) == 8
    assert rows["step"].tolist() == [1, 1, 2, 2] * 2


@pytest.mark.in_processes(2, "ddp/unused")
def test_parameters_that_not_every_process_uses_have_gradients(launched):
    gradients = torch.load(launched / "unused" / "gradients.pt")
    for head, used in enumerate([True, True, True, False]):
        assert (f"classifier.heads.{head}.weight" in gradients[0]) == used


@pytest.mark.in_processes(2, "ddp/unlike")
def test_processes_with_other_settings_are_refused_in_all(launched):
    for error in results(launched / "unlike", "error"):
        assert "disagree on every_steps of GradientSketchCallback (1, 2). Pass" in error


@pytest.mark.in_processes(2, "ddp/uncovered")
def test_rows_that_do_not_add_up_in_one_process_stop_all(launched):
    for error in results(launched / "uncovered", "error"):
        assert "of its norm, more than 0.001. Some part of the model is" in error


@pytest.mark.in_processes(2, "ddp/disk", "ddp/memory")
@pytest.mark.parametrize(
    ("scenario", "failing", "reason", "steps"),
    [
        ("disk", 1, "OSError: .*No space left", [0, 8, 8, 4, 4]),
        ("memory", 0, "MemoryError: .*is full", [0, 8, 8]),
    ],
)
def test_what_fails_in_one_process_ends_recording_in_all(
    launched, scenario, failing, reason, steps
):
    messages = results(launched / scenario, "warnings")
    reasons = ["recording failed in another process"] * 2
    reasons[failing] = reason
    for own, expected in zip(messages, reasons, strict=True):
        (message,) = own
        assert re.search(f"Recording stopped: {expected}", message)
    with pytest.warns(UserWarning, match="no rows from step") as caught:
        rows = columns(load_sketches(launched / scenario).dataset)
    # The process that fails lacks its rows from step 3 on, and so says the other.
    assert any(
        "no rows from step 3 on until training was resumed: recording failed in another"
        in str(warning.message)
        for warning in caught
    )
    assert torch.bincount(rows["step"]).tolist() == steps


def test_a_store_that_the_first_process_does_not_reach(tmp_path):
    def write(resume_step, *steps):
        writer = SketchWriter(
            tmp_path / "sketches", Header(SKETCH), resume_step, rank=1, world_size=2
        )
        for step in steps:
            writer.append("per_step", step_row(step))
        writer.flush()
        writer.close()

    def steps_there():
        (manifest,) = read_manifests(tmp_path / "sketches")
        return [(shard.first_step, shard.last_step) for shard in manifest.shards]

    write(0, 1, 2, 3)
    write(2, 3, 4)
    assert steps_there() == [(1, 2), (3, 4)]
    with pytest.warns(
        UserWarning, match=r"Renamed .*: it holds rows up to step 4 .* not resumed"
    ):
        write(0, 1)
    assert steps_there() == [(1, 1)]
