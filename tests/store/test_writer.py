"""Rows are written in the background: how many wait, in what order, and what fails."""

import errno
import os
import threading
import weakref

import numpy as np
import pytest
import torch

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.durable import Draft
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_STEP, ROW_DTYPES
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import step_row

SIZE = 1024
SKETCH = ModelSketch((("weight", (SIZE, 2)),), SIZE)


class Memory:
    """How many bytes of sketches are held, by whomever."""

    def __init__(self):
        self.held = self.most = 0
        self.lock = threading.Lock()

    def step_row(self, step):
        """A row whose memory is counted until it is free."""
        sketch = np.full((1, SIZE), step, dtype=np.float32)
        weakref.finalize(sketch, self.count, -sketch.nbytes)
        self.count(sketch.nbytes)
        return step_row(step, sketch=torch.from_numpy(sketch))

    def count(self, change):
        with self.lock:
            self.held += change
            self.most = max(self.most, self.held)


def record(writer, steps, memory=None):
    for step in steps:
        writer.append(PER_STEP, (memory or Memory()).step_row(step))
        writer.end_step()


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_rows_on_their_way_fit_the_buffer_however_slow_the_disk(
    tmp_path, row_dtype, monkeypatch
):
    buffer_bytes = 64 * 4 * SIZE
    header = Header(SKETCH, row_dtype=row_dtype)
    writer = SketchWriter(tmp_path, header, buffer_bytes=buffer_bytes)
    plain, memory = os.fsync, Memory()
    waiting = []

    def fsync(descriptor):
        threading.Event().wait(0.005)
        waiting.append(len(list(tmp_path.glob("*.arrow.tmp"))))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    record(writer, range(1, 300), memory)
    writer.flush()
    writer.close()
    assert len(load_sketches(tmp_path).steps) == 299
    kept = getattr(torch, row_dtype).itemsize / 4
    row = 4 * SIZE
    # The rows that come and those before, which are held once more as they are kept. A
    # part ends with the row that fills it.
    part = buffer_bytes / (2 + kept) + row
    assert buffer_bytes / 4 < memory.most <= 2 * part
    assert memory.most + kept * part <= buffer_bytes + 3 * row
    assert memory.held == 0
    assert max(waiting) <= 2


def test_rows_are_free_before_their_file_is_written(tmp_path, monkeypatch):
    memory, held = Memory(), []

    def draft(path, content):
        held.append(memory.held)
        return Draft(path, content)

    monkeypatch.setattr("hf_sketch.store.shards.Draft", draft)
    writer = SketchWriter(tmp_path, Header(SKETCH))
    record(writer, [1, 2, 3], memory)
    assert memory.held == 3 * 4 * SIZE
    writer.flush()
    assert held == [0]


def test_a_file_is_made_while_the_one_before_is_synced(tmp_path, monkeypatch):
    writer = SketchWriter(tmp_path, Header(SKETCH), buffer_bytes=1)
    plain, both_are_there = os.fsync, threading.Event()

    def fsync(descriptor):
        assert both_are_there.wait(10)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    record(writer, [1, 2])
    while len(list(tmp_path.glob("*.arrow.tmp"))) < 2:
        assert writer.last_step == 0
    both_are_there.set()
    writer.flush()
    assert load_sketches(tmp_path).steps["step"][:] == [1, 2]


def test_nothing_is_named_before_it_is_synced(tmp_path, monkeypatch):
    writer = SketchWriter(tmp_path, Header(SKETCH), buffer_bytes=1)
    done = []

    def recorded(call, path_of):
        def wrapped(*arguments):
            call(*arguments)
            done.append((call.__name__, path_of(arguments[0]).removesuffix(".tmp")))

        return wrapped

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115, PTH119

    monkeypatch.setattr(os, "fsync", recorded(os.fsync, name_of))
    monkeypatch.setattr(os, "replace", recorded(os.replace, lambda path: path.name))
    record(writer, [1])
    writer.flush()
    shard, manifest = "per_step-00000-000001.arrow", "manifest-00000.jsonl"
    assert done == [
        ("fsync", shard),
        ("replace", shard),
        ("fsync", tmp_path.name),
        ("fsync", manifest),
    ]


def test_after_an_error_no_later_rows_are_listed(tmp_path, monkeypatch):
    writer = SketchWriter(tmp_path, Header(SKETCH), buffer_bytes=1)
    record(writer, [1])
    writer.flush()
    plain, failed = os.fsync, threading.Event()

    def fsync(descriptor):
        if failed.is_set():
            return plain(descriptor)
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"rows after step 1 .*space.* Free disk space"):
        record(writer, range(2, 50))
    with pytest.raises(OSError, match="Cannot write the rows after step 1"):
        writer.flush()
    writer.close()
    assert load_sketches(tmp_path).steps["step"][:] == [1]
    assert not list(tmp_path.glob("*.tmp"))


def test_what_cannot_be_synced_is_said_at_the_next_part(tmp_path, monkeypatch):
    writer = SketchWriter(tmp_path, Header(SKETCH), buffer_bytes=1)

    def fsync(descriptor):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fsync", fsync)
    record(writer, [1])
    with pytest.raises(OSError, match="the disk is gone"):
        writer.flush()  # waits until it has failed
    with pytest.raises(OSError, match=r"rows after step 0 .*the disk is gone"):
        record(writer, [2])
