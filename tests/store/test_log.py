"""Manifests as logs: what a cut, a flip or a crash does to them, and their size."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.durable import append_file, read_sealed
from hf_sketch.store import log
from hf_sketch.store.header import Header
from hf_sketch.store.log import read_logs, write_log
from hf_sketch.store.maintenance import find_problems, repair
from hf_sketch.store.manifest import Gap, Manifest
from hf_sketch.store.rows import PER_STEP
from hf_sketch.store.shards import Shard
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import (
    GOLDEN,
    SKETCH,
    read_lines,
    step_row,
    write_lines,
    write_steps,
)

DIGEST = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of five steps, each flushed."""
    directory = tmp_path_factory.mktemp("log") / "sketches"
    writer = SketchWriter(directory, Header(SKETCH))
    for step in range(1, 6):
        writer.append(PER_STEP, step_row(step))
        writer.flush()
    writer.close()
    return directory


@pytest.fixture
def store(tmp_path, written):
    """A copy of it."""
    shutil.copytree(written, tmp_path / "sketches")
    return tmp_path / "sketches"


def shards(first, count):
    """What a flush of examples and a step lists, `count` times."""
    for number in range(first, first + count):
        yield [
            Shard(
                f"{kind}-00000-{2 * number + place:06d}.arrow",
                kind,
                8,
                number,
                number,
                123456,
                2192,
                DIGEST,
                DIGEST,
            )
            for place, kind in enumerate(("per_example", "per_step"))
        ]


def steps_of(directory):
    return load_sketches(directory).steps["step"][:]


def test_half_a_line_at_the_end_counts_for_nothing(store):
    path = store / "manifest-00000.jsonl"
    data = path.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        (read,) = read_logs(store)
        assert read.manifest.last_step == 4, end
    assert steps_of(store) == [1, 2, 3, 4]
    assert "does not list per_step-00000-000005.arrow" in find_problems(store)[-1]


@pytest.mark.parametrize("rest", [b"\0" * 100, b'{"bytes":       293,"x\0\0\0\0'])
def test_zeros_that_a_power_cut_leaves_count_for_nothing(store, rest):
    path = store / "manifest-00000.jsonl"
    path.write_bytes(path.read_bytes() + rest)
    assert steps_of(store) == [1, 2, 3, 4, 5]
    assert f"ends in {len(rest)} bytes of an entry" in find_problems(store)[0]
    assert repair(store) == [
        f"{len(rest)} bytes of an entry at the end of {path.name} were cut"
    ]
    assert find_problems(store) == []


def test_every_byte_that_changed_is_named(store):
    path = store / "manifest-00000.jsonl"
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytes([data[place] ^ 1 << place % 8])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        with pytest.raises(ValueError, match=r"manifest-00000\.jsonl was changed"):
            read_logs(store)


def test_lines_that_change_places_or_go_are_named(store):
    path = store / "manifest-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:2], *lines[3:]],
        [*lines, lines[-1]],
        lines[1:],
        [],
        lines[:-2],  # files of two flushes are there that no line lists
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(ValueError, match=r"manifest-00000\.jsonl was changed"):
            load_sketches(store)
        assert "jsonl was changed" in find_problems(store)[0]
    repair(store)
    assert steps_of(store) == [1, 2, 3, 4, 5]


def test_training_goes_on_after_half_a_line(store):
    path = store / "manifest-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    write_steps(store, [5, 6], resume_step=4)
    assert steps_of(store) == [1, 2, 3, 4, 5, 6]
    assert find_problems(store) == []


def test_what_does_not_fit_leaves_no_half_line(store, monkeypatch):
    """A disk that is full takes some bytes of a line, and later has room again."""
    path, plain = store / "manifest-00000.jsonl", os.write
    before = path.read_bytes()

    def full(file, data):
        if not os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl"):  # noqa: PTH115
            return plain(file, data)
        if len(data) > 50:
            return plain(file, data[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append_file(path, len(before), b"x" * 80)
    assert path.read_bytes() == before


def test_a_log_that_another_process_writes_to_is_left_alone(store):
    writer = SketchWriter(store, Header(SKETCH), 5)
    (other,) = read_logs(store)
    other.append(store, gaps=[Gap(6, "the other one stopped", 6)])
    path = store / "manifest-00000.jsonl"
    before = path.read_bytes()
    writer.append(PER_STEP, step_row(6))
    with pytest.raises(OSError, match="another process writes here"):
        writer.flush()
    writer.close()
    assert path.read_bytes() == before


def test_a_snapshot_says_what_the_lines_before_said(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_SNAPSHOT_ENTRIES", 5)
    current = write_log(tmp_path, Manifest())
    expected = []
    for number, listed in enumerate(shards(1, 30), 1):
        gap = Gap(number, "none", number)
        current = current.append(tmp_path, listed, [gap])
        expected += listed
        (read,) = read_logs(tmp_path)
        assert read == current
        assert list(read.manifest.shards) == expected
        assert len(read.manifest.gaps) == number
    assert len(read_lines(tmp_path / "manifest-00000.jsonl")[0]["shards"]) > 20
    assert not list(tmp_path.glob("*.tmp"))


def test_bytes_written_grow_with_the_flushes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    written = []
    for name in ("append_file", "replace_file"):
        plain = getattr(log, name)

        def counted(*arguments, plain=plain):
            written.append(len(arguments[-1]))
            plain(*arguments)

        monkeypatch.setattr(log, name, counted)
    current, sizes = write_log(tmp_path, Manifest()), {}
    for number, listed in enumerate(shards(1, 8000), 1):
        current = current.append(tmp_path, listed)
        sizes[number] = sum(written)
    assert sizes[2000] < 2e6
    assert sizes[8000] < 4.2 * sizes[2000]
    (read,) = read_logs(tmp_path)
    assert read == current
    assert len(read.manifest.shards) == 16000


def test_numbers_of_files_that_are_dropped_are_not_used_again(store):
    write_steps(store, [4], resume_step=3)
    assert steps_of(store) == [1, 2, 3, 4]
    assert sorted(p.name[-8:] for p in store.glob("*.arrow")) == [
        "01.arrow",
        "02.arrow",
        "03.arrow",
        "06.arrow",
    ]


def test_a_store_of_version_1_is_upgraded(tmp_path, capsys):
    old = tmp_path / "sketches"
    shutil.copytree(GOLDEN[1], old)
    rows = load_sketches(old).dataset[:]
    main(["upgrade", str(tmp_path)])
    path = old / "manifest-00000.json"
    assert capsys.readouterr().out == f"{path} is now of format version 2\n"
    assert not path.exists()
    assert read_sealed(old / "header.json")["format_version"] == 2
    assert (old / "manifest-00000.jsonl").read_bytes().count(b"\n") == 1
    assert load_sketches(old).dataset[:] == rows
    assert find_problems(old) == []
    main(["upgrade", str(tmp_path)])
    assert capsys.readouterr().out == "the format was the newest one\n"


def test_an_upgrade_that_was_cut_off_is_finished(tmp_path):
    old = tmp_path / "sketches"
    shutil.copytree(GOLDEN[1], old)
    main(["upgrade", str(old)])
    shutil.copy(GOLDEN[1] / "manifest-00000.json", old)
    assert steps_of(old) == [1, 2, 3]
    main(["upgrade", str(old)])
    assert sorted(p.name for p in old.glob("manifest*")) == ["manifest-00000.jsonl"]


def test_resuming_a_store_of_version_1_goes_on_with_version_2(tmp_path):
    old = tmp_path / "sketches"
    shutil.copytree(GOLDEN[1], old)
    header = Header(SKETCH, row_dtype="float16")
    write_steps(old, [3, 4], header, resume_step=2)
    assert sorted(p.name for p in old.glob("manifest*")) == ["manifest-00000.jsonl"]
    assert read_sealed(old / "header.json")["format_version"] == 2
    assert steps_of(old) == [1, 2, 3, 4]
    assert find_problems(old) == []


def test_a_marker_of_a_full_disk_becomes_a_gap_of_the_log(store):
    path = store / "manifest-00000.full"
    path.touch()
    with pytest.warns(UserWarning, match="no rows from step 6 on"):
        load_sketches(store)
    write_steps(store, [8], resume_step=7)
    assert not path.exists()
    assert read_lines(store / "manifest-00000.jsonl")[0]["gaps"] == [
        [6, "the disk was full", None]
    ]
    with pytest.warns(UserWarning, match="no rows from step 6 on"):
        assert steps_of(store) == [1, 2, 3, 4, 5, 8]


def test_lines_of_another_writer_are_read(store):
    """The format's page is enough to write a manifest."""
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    first = contents[0]
    first["shards"] = [shard for content in contents for shard in content["shards"]]
    write_lines(path, [first, {"shards": [], "gaps": [[9, "it stopped", 9]]}])
    with pytest.warns(UserWarning, match="no rows of steps 9 to 9: it stopped"):
        assert steps_of(store) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.full)])
def test_no_flushed_row_is_lost_to_a_kill_at_any_call(every):
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_stores", str(every)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("no row is lost") == 9
