"""A store that a run is writing to gives the rows that are complete, at any moment."""

import threading

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.compaction import LEAST_BYTES
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import HEADER, example_rows, step_row
from tests.helpers.trained.training import tiny_dataset, tiny_trainer

FLUSHES = 20


@pytest.mark.parametrize("file_bytes", [LEAST_BYTES, 6000])
def test_a_reader_sees_whole_steps_while_a_writer_writes(tmp_path, file_bytes):
    """Also while it joins files, which removes some."""
    directory = tmp_path / "sketches"
    writer = SketchWriter(directory, HEADER, file_bytes=file_bytes)
    failures = []

    def write():
        try:
            for step in range(1, FLUSHES + 1):
                writer.append(PER_EXAMPLE, example_rows(step, [2 * step, 2 * step + 1]))
                writer.append(PER_STEP, step_row(step))
                writer.flush()
        except BaseException as error:  # raised in the thread that reads
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    seen = [0]
    while thread.is_alive() or (seen[-1] < FLUSHES and not failures):
        store = load_sketches(directory)
        steps = len(store.steps)
        assert store.steps["step"][:] == list(range(1, steps + 1))
        ids = store.dataset["example_id"][:]
        assert ids == list(range(2, 2 + len(ids)))
        assert len(ids) in (2 * steps, 2 * steps + 2)  # read one after the other
        seen.append(steps)
    thread.join()
    writer.close()
    assert not failures
    assert seen == sorted(seen)
    assert len(set(seen)) > 2  # it was read while it grew


def test_queries_are_answered_while_training_goes_on(tmp_path):
    sizes = []

    class Asks(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            store = load_sketches(args.output_dir)
            state_before = torch.get_rng_state()
            queries = sketch_dataset(model, tiny_dataset(2), store.model_sketch)
            lines = store.attribute(queries, top_k=1)
            assert torch.equal(torch.get_rng_state(), state_before)
            assert max(store.dataset["step"][:]) == state.global_step
            assert len(lines) == 2
            sizes.append(len(store.dataset))

    callbacks = [GradientSketchCallback(64), Asks()]
    trainer = tiny_trainer(tmp_path, *callbacks, save_strategy="steps", save_steps=1)
    trainer.train()
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 1
