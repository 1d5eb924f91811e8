"""Small files become large ones: the same rows, in their order, and whole."""

import shutil

import pytest

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.store.blocks import sketch_matrix
from hf_sketch.store.compaction import compact
from hf_sketch.store.log import read_manifests
from hf_sketch.store.maintenance import find_problems, repair
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import (
    GOLDEN,
    HEADER,
    example_rows,
    write_steps,
    write_store,
)

FILE_BYTES = {PER_EXAMPLE: 2328, PER_STEP: 1664}  # of two rows, and of one


@pytest.fixture
def store(tmp_path):
    """Six steps, each in a file per kind."""
    return write_store(tmp_path / "sketches", steps=range(1, 7))


def rows_of(directory):
    found = load_sketches(directory)
    return found.dataset[:], found.steps[:]


def files_of(directory, kind):
    (manifest,) = read_manifests(directory)
    return [shard for shard in manifest.shards if shard.kind == kind]


def test_the_command_leaves_the_same_rows_in_one_file_per_kind(store, capsys):
    before = rows_of(store)
    main(["compact", str(store)])
    assert capsys.readouterr().out == f"{store}: 12 files of process 0 became 2\n"
    assert rows_of(store) == before
    assert find_problems(store) == []
    assert sorted(path.name for path in store.iterdir()) == [
        "header.json",
        "manifest-00000.jsonl",
        "per_example-00000-000013.arrow",
        "per_step-00000-000014.arrow",
    ]
    main(["compact", str(store)])
    assert capsys.readouterr().out == "there were no small files to join\n"


def test_files_have_the_least_length_and_less_than_twice_that(store):
    before = rows_of(store)
    compact(store, 2 * FILE_BYTES[PER_EXAMPLE])
    assert [(s.first_step, s.last_step) for s in files_of(store, PER_EXAMPLE)] == [
        (1, 2),
        (3, 4),
        (5, 6),
    ]
    assert [(s.first_step, s.last_step) for s in files_of(store, PER_STEP)] == [
        (1, 3),
        (4, 6),
    ]
    assert rows_of(store) == before


def test_long_files_stay_as_they_are(tmp_path):
    store = write_store(tmp_path / "sketches", steps=range(1, 4))
    compact(store, 1)
    assert len(files_of(store, PER_EXAMPLE)) == 3
    compact(store)
    (large,) = files_of(store, PER_EXAMPLE)
    write_examples(store, [4, 5])
    compact(store, large.size_bytes)  # each new one is shorter
    first, second = files_of(store, PER_EXAMPLE)
    assert first == large
    assert (second.first_step, second.last_step) == (4, 5)


def write_examples(store, steps):
    """Add examples of steps, each in a file."""
    writer = SketchWriter(store, HEADER, steps[0] - 1)
    for step in steps:
        writer.append(PER_EXAMPLE, example_rows(step, [100 * step, 100 * step + 1]))
        writer.flush()
    writer.close()


def test_training_resumes_within_a_joined_file(store):
    before = rows_of(store)
    compact(store)
    for step in (4, 2):
        write_steps(store, [], HEADER, resume_step=step)
        examples, steps = rows_of(store)
        assert steps == {name: column[:step] for name, column in before[1].items()}
        assert examples == {
            name: column[: 2 * step] for name, column in before[0].items()
        }
        assert find_problems(store) == []
    assert len(list(store.glob("*.arrow"))) == 2


def test_each_process_joins_its_own(tmp_path):
    store = tmp_path / "sketches"
    for rank in (0, 1):
        write_store(store, steps=range(1, 5), rank=rank, world_size=2)
    before = load_sketches(store).dataset
    compact(store)
    after = load_sketches(store).dataset
    assert len(after.cache_files) == 2
    assert find_problems(store) == []
    for rank in (0, 1):
        of_rank = [
            rows.filter(lambda row, rank=rank: row["rank"] == rank)[:]
            for rows in (before, after)
        ]
        assert of_rank[0] == of_rank[1]
    assert sketch_matrix(after).sum() == sketch_matrix(before).sum()


def test_a_damaged_file_is_named_and_the_store_stays(store):
    path = store / "per_example-00000-000003.arrow"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"!" + data[-19:])
    names = sorted(path.name for path in store.glob("*.arrow"))
    with pytest.raises(ValueError, match=f"{path.name} was changed: the checksum"):
        compact(store)
    assert sorted(path.name for path in store.glob("*.arrow")) == names
    path.write_bytes(data)
    assert find_problems(store) == []


def test_a_store_of_version_1_becomes_one_of_version_2(tmp_path):
    store = tmp_path / "sketches"
    shutil.copytree(GOLDEN[1], store)
    before = rows_of(store)
    compact(store)
    assert rows_of(store) == before
    assert find_problems(store) == []
    assert sorted(p.name for p in store.glob("manifest*")) == ["manifest-00000.jsonl"]


def test_a_manifest_is_rebuilt_without_files_that_were_replaced(store, tmp_path):
    """As a crash leaves them before they are removed."""
    before = rows_of(store)
    copy = tmp_path / "old"
    shutil.copytree(store, copy)
    compact(store)
    for path in copy.glob("*.arrow"):
        shutil.copy(path, store)
    assert rows_of(store) == before
    (store / "manifest-00000.jsonl").write_bytes(b"{}")
    repair(store)
    assert rows_of(store) == before
    assert len(list(store.glob("*.arrow"))) == 2
    assert len(list((store / "damaged").glob("*.arrow"))) == 12
