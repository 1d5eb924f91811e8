"""A store has the rows, files and bytes that were planned."""

import pytest
import torch

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.planning.disk import RowFormat, store_size
from hf_sketch.planning.plan import plan_recording
from hf_sketch.planning.settings import RowSettings, TrainingRun
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, ROW_DTYPES
from hf_sketch.store.writer import SketchWriter
from tests.helpers.trained.training import tiny_bert, tiny_dataset, tiny_trainer


def files_of(directory, kind):
    return sorted(directory.glob(f"{kind}-*.arrow"))


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize(
    ("rows", "groups"), [(1, ()), (7, ()), (64, ()), (7, ("a", "b", "c"))]
)
def test_the_bytes_of_a_file_are_those_that_the_writer_leaves(
    tmp_path, row_dtype, rows, groups
):
    shapes = tuple((f"weight.{i}", (64, 64)) for i in range(3))
    sketch = ModelSketch(shapes, 48, groups=groups)
    count = max(1, len(groups))
    writer = SketchWriter(tmp_path / "sketches", Header(sketch, row_dtype=row_dtype))
    one = torch.ones(rows)
    for kind, names in (
        (PER_EXAMPLE, ("example_id", "micro_step", "rank", "loss", "weight")),
        (PER_STEP, ("clip_factor",)),
    ):
        names = (*names, "epoch", "step", "learning_rate", "gradient_norm")
        columns = {name: one for name in names}
        columns |= {"finite": one.bool(), "sketch": torch.randn(rows, count * 48)}
        writer.append(kind, columns)
    writer.flush()
    writer.close()
    for kind in (PER_EXAMPLE, PER_STEP):
        (path,) = files_of(tmp_path / "sketches", kind)
        row = RowFormat(kind, count * 48, row_dtype, count)
        expected = row.file_bytes(rows)
        assert path.stat().st_size == expected


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_a_row_of_many_has_the_bytes_of_its_columns(row_dtype):
    kind = RowFormat(PER_EXAMPLE, 4096, row_dtype)
    more = kind.file_bytes(16008) - kind.file_bytes(8)
    assert more == 16000 * kind.row_bytes
    short = 0 if row_dtype == "float32" else 4
    sketch = 4096 * {"float32": 4, "float16": 2, "int8": 1}[row_dtype]
    assert kind.row_bytes == 8 + 4 * 4 + 8 + 4 + 8 + 4 + 1 / 8 + short + sketch


@pytest.mark.parametrize(("save_steps", "groups"), [(None, 1), (3, 4)])
def test_the_store_of_a_trained_run_has_the_planned_rows_files_and_bytes(
    tmp_path, save_steps, groups
):
    saving = {"save_strategy": "no"}
    if save_steps is not None:
        saving = {"save_strategy": "steps", "save_steps": save_steps}
    trainer = tiny_trainer(
        tmp_path,
        GradientSketchCallback(out_size=256, row_dtype="float16", groups=groups),
        model=tiny_bert(),
        dataset=tiny_dataset(24),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=2,
        **saving,
    )
    trainer.train()
    run = TrainingRun(24, epochs=2, batch_size=4, tokens=11, save_steps=save_steps)
    rows = RowSettings(256, row_dtype="float16", groups=groups)
    store = plan_recording(tiny_bert(), run, rows).store
    directory = tmp_path / "sketches"
    assert store.rows == len(load_sketches(tmp_path).dataset)
    assert store.step_rows == len(load_sketches(tmp_path).steps)
    arrows = [*files_of(directory, PER_EXAMPLE), *files_of(directory, PER_STEP)]
    assert store.files == store.files_a_rank == len(arrows)
    manifest = (directory / "manifest-00000.jsonl").stat().st_size
    assert store.manifest_bytes == pytest.approx(manifest, rel=0.15, abs=150)
    written = sum(path.stat().st_size for path in arrows) + manifest
    assert store.total_bytes == pytest.approx(written, rel=0.02)


# Files of 26 MB; then of 16 kB, of which four become one, or a thousand would.
@pytest.mark.parametrize(
    ("size", "steps", "flush_steps", "file_bytes", "count"),
    [
        (2**15, 420, None, 2**29, 3),
        (2**10, 45, 3, 2**16, 5),
        (2**10, 45, 3, 2**15, 5),
        (2**10, 45, 3, 2**29, 1),
        (16, 45, 1, 2**17, 3),
    ],
)
def test_files_are_cut_and_joined_as_the_writer_does_it(
    tmp_path, monkeypatch, size, steps, flush_steps, file_bytes, count
):
    monkeypatch.setattr("hf_sketch.store.compaction.MOST_FILES", 8)
    monkeypatch.setattr("hf_sketch.planning.disk.MOST_FILES", 8)
    sketch = ModelSketch((("weight", (size, 2)),), size)
    header = Header(sketch)
    writer = SketchWriter(tmp_path / "sketches", header, file_bytes=file_bytes)
    row = {name: torch.zeros(1) for name in ("epoch", "step", "learning_rate")}
    row |= {name: torch.zeros(1) for name in ("gradient_norm", "clip_factor")}
    row |= {"finite": torch.ones(1).bool(), "sketch": torch.zeros(1, size)}
    for step in range(1, steps + 1):
        writer.append(PER_STEP, {**row, "step": torch.tensor([step])})
        writer.end_step()
        if flush_steps and step % flush_steps == 0:
            writer.flush()
    writer.flush()
    writer.join_files()
    writer.close()
    planned = store_size(
        RowFormat(PER_STEP, size),
        rows_a_step=1,
        steps=steps,
        per_step=False,
        ranks=1,
        flush_steps=flush_steps,
        file_bytes=file_bytes,
    )
    files = files_of(tmp_path / "sketches", PER_STEP)
    assert (planned.files, len(files)) == (count, count)
    assert planned.total_bytes == pytest.approx(
        sum(path.stat().st_size for path in (tmp_path / "sketches").iterdir()),
        rel=0.001,
        abs=1100,  # the header
    )


def test_ranks_share_the_examples_and_the_first_one_writes_the_steps():
    kind = RowFormat(PER_EXAMPLE, 64)
    options = {"rows_a_step": 8, "steps": 10, "per_step": True}
    one = store_size(kind, ranks=1, **options)
    four = store_size(kind, ranks=4, **options)
    assert four.rows == 4 * one.rows
    assert four.step_rows == one.step_rows == 10
    assert (one.files, four.files) == (2, 5)
