"""A writer joins its small files: the same rows, and training goes on if it cannot."""

import shutil
from collections import namedtuple

import pytest

from hf_sketch import load_sketches
from hf_sketch.attribution import loading
from hf_sketch.store import compaction, writer
from hf_sketch.store.maintenance import find_problems
from hf_sketch.store.manifest import Manifest
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.shards import Shard
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import HEADER, example_rows, step_row, write_store

FOUR_FILES = 7000  # of two examples each; most of their bytes are heads
MORE_THAN_ONE = 2350


def record(directory, steps, file_bytes=FOUR_FILES, resume_step=0, ends=True):
    """Write steps, each flushed by itself."""
    sketches = SketchWriter(directory, HEADER, resume_step, file_bytes=file_bytes)
    for step in steps:
        sketches.append(PER_EXAMPLE, example_rows(step, [100 * step, 100 * step + 1]))
        sketches.append(PER_STEP, step_row(step))
        sketches.flush()
    if ends:
        sketches.join_files()
    sketches.close()


def rows_of(directory):
    found = load_sketches(directory)
    return found.dataset[:], found.steps[:]


def files_of(directory, kind):
    return sorted(directory.glob(f"{kind}-*.arrow"))


@pytest.fixture
def expected(tmp_path):
    """Rows of 20 steps, each in files of its own."""
    return rows_of(write_store(tmp_path / "apart" / "sketches", steps=range(1, 21)))


@pytest.fixture
def store(tmp_path):
    return tmp_path / "sketches"


def test_files_are_joined_as_soon_as_they_are_long_enough(store, expected):
    record(store, range(1, 21), file_bytes=MORE_THAN_ONE, ends=False)
    sizes = [path.stat().st_size for path in files_of(store, PER_EXAMPLE)]
    assert len(sizes) == 10
    assert all(MORE_THAN_ONE <= size < 2 * MORE_THAN_ONE for size in sizes)
    assert len(files_of(store, PER_STEP)) < 10
    assert rows_of(store) == expected
    assert find_problems(store) == []
    assert not list(store.glob("*.tmp"))


def test_the_last_files_become_one_as_training_ends(store, expected):
    record(store, range(1, 21), file_bytes=2**20)
    assert len(files_of(store, PER_EXAMPLE)) == len(files_of(store, PER_STEP)) == 1
    assert rows_of(store) == expected


def test_few_files_stay(store):
    record(store, range(1, 5), file_bytes=2**20)
    assert len(files_of(store, PER_EXAMPLE)) == 4


@pytest.mark.parametrize("step", [3, 7, 12])
def test_training_resumes_within_a_joined_file(store, expected, step):
    record(store, range(1, 15), ends=False)
    record(store, range(step + 1, 21), resume_step=step)
    assert rows_of(store) == expected
    assert find_problems(store) == []


def test_a_thousand_tiny_files_become_one_of_middle_length(
    store, expected, monkeypatch
):
    monkeypatch.setattr(compaction, "MOST_FILES", 5)
    written = []
    plain = compaction.join

    def join(directory, group, number):
        written.extend(shard.file for shard in group)
        return plain(directory, group, number)

    monkeypatch.setattr(writer, "join", join)
    record(store, range(1, 21), file_bytes=5 * 5000, ends=False)
    assert len(files_of(store, PER_EXAMPLE)) < 8
    assert len(written) == len(set(written))  # each file once
    assert rows_of(store) == expected


def test_rows_go_on_where_files_cannot_be_joined(store, expected, monkeypatch):
    def join(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "join", join)
    with pytest.warns(UserWarning, match="cannot be joined.*No space left"):
        record(store, range(1, 21))
    assert len(files_of(store, PER_EXAMPLE)) == 20
    assert rows_of(store) == expected


def test_a_damaged_file_is_not_joined(store):
    record(store, [1])
    (path,) = files_of(store, PER_EXAMPLE)
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"!" + data[-19:])
    with pytest.warns(UserWarning, match=f"cannot be joined: .*{path.name} was chang"):
        record(store, range(2, 9), resume_step=1)
    assert len(files_of(store, PER_EXAMPLE)) == 8
    path.write_bytes(data)
    steps = load_sketches(store).dataset["step"][:]
    assert steps == [step for step in range(1, 9) for _ in "ab"]


def test_room_is_left_for_rows(store, expected, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4 * FOUR_FILES - 1))
    record(store, range(1, 21))
    assert len(files_of(store, PER_EXAMPLE)) == 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40))
    record(store, [], file_bytes=2**20, resume_step=20)
    assert len(files_of(store, PER_EXAMPLE)) == 1
    assert rows_of(store) == expected


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_reader_that_finds_a_file_gone_reads_the_new_manifest(
    store, expected, monkeypatch, skip_damaged
):
    """Files are joined between its look at the manifest and at the files."""
    record(store, range(1, 21), file_bytes=2**30, ends=False)
    plain, times = loading.check_shard, []

    def check_shard(*arguments):
        if not times:
            compaction.compact(store)
        times.append(1)
        return plain(*arguments)

    monkeypatch.setattr(loading, "check_shard", check_shard)
    found = load_sketches(store, skip_damaged=skip_damaged)
    assert (found.dataset[:], found.steps[:]) == expected
    assert len(times) == 3  # a file that is gone, and two that have all rows


def test_files_of_one_step_keep_the_order_in_which_they_were_written(store):
    """As those of updates may have: a run that resumes begins with such a row."""
    shards = [
        Shard(f"update-00000-00000{n}.arrow", "update", 1, step, step, 10, 1, "", "")
        for n, step in enumerate([1, 2, 2, 2, 3], 1)
    ]
    newest = compaction.newest_files(Manifest(shards=tuple(shards)), "update", 45)
    assert newest == shards


def test_a_run_that_has_lost_its_lock_joins_nothing(store):
    sketches = SketchWriter(store, HEADER, file_bytes=2**20)
    for step in range(1, 7):
        sketches.append(PER_EXAMPLE, example_rows(step, [100 * step, 100 * step + 1]))
        sketches.flush()
    (lock,) = store.parent.glob("*.lock")
    lock.write_text("{}")
    with pytest.warns(UserWarning, match="cannot be joined.*another process writes"):
        sketches.join_files()
    sketches.close()
    assert len(files_of(store, PER_EXAMPLE)) == 6
    assert find_problems(store) == []


def test_what_a_killed_join_has_left_goes_as_training_resumes(store, expected):
    record(store, range(1, 11))
    left = store / "per_example-00000-000099.arrow.tmp"
    left.write_bytes(b"part of a file")
    record(store, range(11, 21), resume_step=10)
    assert not left.exists()
    assert rows_of(store) == expected
