"""What a run does with the store that it finds."""

import re
from dataclasses import replace

import pytest

from hf_sketch import load_sketches
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.header import Header, read_header
from hf_sketch.store.manifest import Gap, Manifest
from hf_sketch.store.opening import decide_opening
from hf_sketch.store.shards import Shard
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import SKETCH, write_steps

OURS = Header(SKETCH, step_examples=8, processes=2)
OTHER = replace(OURS, model_sketch=replace(SKETCH, seed=1))
STEPS = Shard("per_step-00000-000001.arrow", "per_step", 4, 1, 4, 0, 0, "", "")
EMPTY, ROWS = Manifest(), Manifest(shards=(STEPS,))
GAP = Manifest(gaps=(Gap(1, "the disk was full"),))


@pytest.mark.parametrize(
    ("theirs", "manifest", "resume_step", "action"),
    [
        (None, None, 0, "new"),
        (None, None, 4, "new"),
        (None, ROWS, 4, "set_aside"),  # of an unknown map
        (OURS, EMPTY, 0, "new"),
        (OTHER, EMPTY, 0, "new"),
        (OTHER, EMPTY, 4, "new"),
        (OTHER, GAP, 0, "new"),
        (OTHER, GAP, 4, "refuse"),
        (OURS, GAP, 4, "resume"),
        (OURS, ROWS, 0, "set_aside"),
        (OURS, ROWS, 4, "resume"),
        (OTHER, ROWS, 0, "refuse"),
        (OTHER, ROWS, 4, "refuse"),
    ],
)
def test_a_store_is_made_resumed_set_aside_or_refused(
    theirs, manifest, resume_step, action
):
    manifests = [] if manifest is None else [manifest]
    opening = decide_opening(OURS, theirs, manifests, resume_step)
    assert opening.action == action
    assert opening.header == OURS
    assert bool(opening.reason) == (action in ("set_aside", "refuse"))


def test_only_the_first_process_sets_the_rows_of_others_aside():
    others = Manifest(rank=1, shards=(STEPS,))
    for rank, action in ((0, "set_aside"), (1, "set_aside"), (2, "new")):
        assert decide_opening(OURS, OURS, [others], 0, rank).action == action
        assert decide_opening(OURS, OURS, [others], 4, rank).action == "resume"


def test_resuming_keeps_what_the_store_knows():
    error = MeasuredError(8, 0.99, 0.01, 1e-6)
    theirs = replace(OURS, measured_error=error, step_examples=4, processes=2)
    opening = decide_opening(OURS, theirs, [ROWS], 4)
    assert opening.header == replace(OURS, measured_error=error)
    unknown = replace(OURS, step_examples=None)
    assert decide_opening(unknown, theirs, [ROWS], 4).header.step_examples == 4


def test_a_store_without_columns_of_answers_goes_on_without_them():
    ours = replace(OURS, answers=True)
    assert decide_opening(ours, OURS, [ROWS], 4).header == OURS
    assert decide_opening(OURS, ours, [ROWS], 4).header == ours
    assert decide_opening(ours, OURS, [ROWS], 0).header == ours  # of a store of its own


@pytest.mark.parametrize(
    ("processes", "step_examples", "world_size", "action"),
    [
        (2, 8, 2, "resume"),
        (2, 4, 2, "resume"),  # of other batches the Trainer itself warns
        (4, 8, 4, "resume"),
        (4, 16, 4, "refuse"),
        (4, None, 4, "resume"),
        (2, 4, 4, "resume"),  # from four processes to two, and now with other batches
        (None, 8, 4, "resume"),
        (None, 16, 4, "refuse"),  # a store without the number of its last processes
        (None, 16, 2, "resume"),
    ],
)
@pytest.mark.parametrize("shards", [(), (STEPS,)], ids=["empty", "rows"])
def test_another_number_of_processes_must_take_the_same_number_of_examples_per_step(
    processes, step_examples, world_size, action, shards
):
    theirs = replace(OURS, processes=processes, step_examples=step_examples)
    manifest = Manifest(world_size=world_size, shards=shards)
    opening = decide_opening(OURS, theirs, [manifest], 4)
    assert (opening.action == "refuse") == (action == "refuse")
    if action == "refuse":
        assert re.search(
            r"by 4 processes with 16 examples .* has 2 with 8, .* Resume with 4 proc",
            opening.reason,
        )


def test_training_that_shrank_may_resume_with_other_batches(tmp_path):
    def record(resume_step, step, examples, world_size):
        header = Header(SKETCH, step_examples=examples)
        settings = {"resume_step": resume_step, "world_size": world_size}
        write_steps(tmp_path, [step], header, **settings)

    record(0, 1, 8, world_size=4)
    record(1, 2, 8, world_size=2)
    record(2, 3, 4, world_size=2)
    header = read_header(tmp_path)
    assert (header.processes, header.step_examples) == (2, 4)
    with pytest.raises(ValueError, match=f"Cannot record to {tmp_path}: it was record"):
        record(3, 4, 8, world_size=4)
    with pytest.warns(UserWarning, match=r"no rows of the processes \[1, 2, 3\]"):
        assert load_sketches(tmp_path).steps["step"][:] == [1, 2, 3]


def test_rows_of_processes_that_are_gone_are_dropped_too(tmp_path):
    for rank in (0, 1):
        settings = {"rank": rank, "world_size": 2}
        write_steps(tmp_path, [1, 2], Header(SKETCH), **settings)
    write_steps(tmp_path, [2, 3], Header(SKETCH), resume_step=1)
    assert load_sketches(tmp_path).steps["step"][:] == [1, 1, 2, 3]


def test_a_process_leaves_the_rows_of_another_alone(tmp_path):
    for rank in (0, 1):
        settings = {"rank": rank, "world_size": 2}
        write_steps(tmp_path, [1], Header(SKETCH), **settings)
    first = SketchWriter(tmp_path, Header(SKETCH), 1, world_size=2)
    first.note_gap("the disk is full")  # before the other process is there
    settings = {"resume_step": 1, "rank": 1, "world_size": 2}
    write_steps(tmp_path, [2], Header(SKETCH), **settings)
    with pytest.warns(UserWarning, match="no rows from step 2 on .*: the disk is full"):
        assert load_sketches(tmp_path).steps["step"][:] == [1, 1, 2]


@pytest.mark.parametrize("resume_step", [0, 2])
def test_nothing_is_written_where_nothing_changed(tmp_path, resume_step):
    write_steps(tmp_path, range(1, 1 + resume_step))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    SketchWriter(tmp_path, Header(SKETCH), resume_step).close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("resume_step", [0, 1])
def test_the_check_value_is_computed_once(tmp_path, monkeypatch, resume_step):
    write_steps(tmp_path, range(1, 1 + resume_step))
    computed, sketch_parts = [], ModelSketch.sketch_parts

    def counted(self, parts):
        computed.append(parts)
        return sketch_parts(self, parts)

    monkeypatch.setattr(ModelSketch, "sketch_parts", counted)
    header = Header(replace(SKETCH), step_examples=4)
    writer = SketchWriter(tmp_path, header, resume_step)
    writer.note(measured_error=MeasuredError(2, None, 0.1, 1e-6))
    writer.close()
    assert len(computed) == 1 + (resume_step == 0)  # the header that is replaced, too


def test_a_bad_header_without_rows_is_replaced(tmp_path):
    write_steps(tmp_path, [])
    (tmp_path / "header.json").write_text("{}")
    write_steps(tmp_path, [1])
    assert load_sketches(tmp_path).steps["step"][:] == [1]
    (tmp_path / "header.json").write_text("{}")
    with pytest.raises(ValueError, match=r"header\.json .* restore it from a copy"):
        write_steps(tmp_path, [2], resume_step=1)
