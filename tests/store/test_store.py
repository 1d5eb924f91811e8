import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.durable import read_sealed, write_sealed
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, arrow_table
from hf_sketch.store.shards import write_shard
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import (
    SKETCH,
    read_lines,
    step_row,
    write_lines,
    write_steps,
)


@pytest.fixture
def store(tmp_path):
    """A store of the steps 1 and 2 in one shard and 3 in another."""
    writer = SketchWriter(tmp_path / "sketches", Header(SKETCH))
    for step in (1, 2):
        writer.append(PER_STEP, step_row(step))
    writer.flush()
    writer.append(PER_STEP, step_row(3))
    writer.flush()
    return tmp_path / "sketches"


def test_rows_come_back_bit_for_bit(store):
    steps = load_sketches(store.parent).steps
    assert steps["step"][:] == [1, 2, 3]
    assert steps["sketch"][:] == [
        [s + 0.0, s + 1.0, s + 2.0, s + 3.0] for s in (1, 2, 3)
    ]
    assert load_sketches(store).steps[:] == steps[:]


def test_float64_columns_keep_their_bits(tmp_path):
    writer = SketchWriter(tmp_path, Header(SKETCH))
    writer.append(PER_STEP, step_row(1, value=1 / 3))
    writer.flush()
    assert load_sketches(tmp_path).steps["learning_rate"][:] == [1 / 3]


def test_rows_are_memory_mapped(store):
    load_sketches(store).steps["step"][:]
    before = pa.total_allocated_bytes()
    steps = load_sketches(store).steps
    assert pa.total_allocated_bytes() - before < 2**12
    assert {file["filename"] for file in steps.cache_files} == {
        str(path) for path in store.glob("*.arrow")
    }


def test_shards_are_plain_arrow_files_of_datasets(store):
    one = Dataset.from_file(str(store / "per_step-00000-000001.arrow"))
    assert one["step"][:] == [1, 2]
    assert one.features["sketch"].length == 4


def test_the_manifest_describes_each_shard(store):
    first, _, last = read_lines(store / "manifest-00000.jsonl")
    assert first == {
        "rank": 0,
        "world_size": 1,
        "numbers": 0,
        "shards": [],
        "gaps": [],
    }
    path = store / "per_step-00000-000002.arrow"
    data, head = path.read_bytes(), last["shards"][0][6]
    # The body: the columns, each with room to 8 bytes, and the end of the stream.
    assert data[head:] == b"".join(
        value.ljust(-(-len(value) // 8) * 8, b"\0")
        for value in (
            *(int(x).to_bytes(4, "little") for x in (0, 3)),
            *[np.float64(0.5).tobytes()] * 3,
            b"\1",
            np.arange(3, 7, dtype=np.float32).tobytes(),
        )
    ) + (b"\xff" * 4 + b"\0" * 4)
    shard = {
        "kind": "per_step",
        "number": 2,
        "rows": 1,
        "first_step": 3,
        "last_step": 3,
        "size_bytes": path.stat().st_size,
        "head_bytes": head,
        "head_xxh3_128": xxhash.xxh3_128_hexdigest(data[:head]),
        "xxh3_128": xxhash.xxh3_128_hexdigest(data),
    }
    assert last == {"shards": [[*shard.values()]], "gaps": []}
    assert not list(store.glob("*.tmp"))


def test_the_bytes_of_a_manifest_are_pinned(store):
    path = store / "manifest-00000.jsonl"
    written = path.read_bytes()
    write_lines(path, read_lines(path))
    assert path.read_bytes() == written


def test_the_bytes_of_a_shard_are_pinned(tmp_path):
    columns = {name: column for name, column in step_row(1).items()}
    table = arrow_table(PER_STEP, columns)
    shard = write_shard(tmp_path, PER_STEP, 0, 1, table)
    reader = pa.ipc.open_stream(tmp_path / shard.file)
    assert reader.schema.to_string(show_schema_metadata=False) == (
        "epoch: int32\nstep: int32\nlearning_rate: double\ngradient_norm: double\n"
        "clip_factor: double\nfinite: bool\n"
        "sketch: fixed_size_list<item: float>[4]\n  child 0, item: float"
    )
    names = [field.name for field in reader.schema]
    batch = reader.read_next_batch()
    data = [batch.column(name).buffers()[-1].to_pybytes()[:8].hex() for name in names]
    half = "000000000000e03f"
    assert data[:6] == ["00000000", "01000000", half, half, half, "01"]
    assert batch.column("sketch").flatten().buffers()[1].to_pybytes()[:16].hex() == (
        "0000803f000000400000404000008040"
    )


def test_the_header_is_pinned(store):
    header = read_sealed(store / "header.json")
    check_value = header.pop("check_value")
    assert header.pop("units").startswith("a row is the gradient of the example's own")
    assert header == {
        "format_version": 2,
        "model_sketch": {
            "shapes": [["weight", [8, 4]], ["bias", [8]]],
            "out_size": 4,
            "layout": "blocked",
            "seed": 0,
            "operator": "srht",
            "frozen": [],
        },
        "loss": "mean",
        "row_dtype": "float32",
        "measured_error": None,
        "step_examples": None,
        "processes": 1,
        "unverified": None,
        "unowned": None,
        "per_row": False,
        "answers": False,
        "train_rows": None,
    }
    assert check_value == pytest.approx(SKETCH.check_value())


def test_a_truncated_shard_is_named_and_the_others_stay_readable(store):
    path = store / "per_step-00000-000001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"000001.arrow has \d+ bytes, not \d+"):
        load_sketches(store)
    with pytest.warns(UserWarning, match=r"Left out 2 rows. .*000001.arrow"):
        assert load_sketches(store, skip_damaged=True).steps["step"][:] == [3]


def test_a_missing_shard_is_named(store):
    (store / "per_step-00000-000002.arrow").unlink()
    with pytest.raises(ValueError, match=r"is missing\. Restore it, set it aside"):
        load_sketches(store)


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No sketches at .* Pass the"):
        load_sketches(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 99}, "format_version 99, .* up to 2. Upgrade it: pip"),
        (
            {"check_value": [9.0] * 4},
            r"This installation computes another map .* store's \[9.0",
        ),
    ],
)
def test_a_header_of_another_making_is_named(store, change, match):
    header = read_sealed(store / "header.json")
    write_sealed(store / "header.json", {**header, **change})
    with pytest.raises(ValueError, match=match):
        load_sketches(store)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("header.json", "from a copy"), ("manifest-00000.jsonl", "run hf-sketch repair")],
)
def test_a_changed_description_is_named(store, name, fix):
    text = (store / name).read_text()
    (store / name).write_text(text.replace("seed", "weed").replace("step", "stop"))
    message = rf"{name} .*must have the digest \w+ .* got \w+.* {fix}"
    with pytest.raises(ValueError, match=message):
        load_sketches(store)


def test_a_store_without_rows_opens(tmp_path):
    SketchWriter(tmp_path, Header(SKETCH))
    sketches = load_sketches(tmp_path)
    assert len(sketches.dataset) == len(sketches.steps) == 0
    assert sketches.dataset.features["sketch"].length == 4


def test_resuming_continues_the_numbers_of_the_shards(store):
    write_steps(store, [4], resume_step=3)
    assert load_sketches(store).steps["step"][:] == [1, 2, 3, 4]
    assert (store / "per_step-00000-000003.arrow").exists()


def test_unflushed_rows_count_towards_the_buffer(tmp_path):
    writer = SketchWriter(tmp_path, Header(SKETCH), buffer_bytes=3 * 100)
    for step in (1, 2, 3, 4, 5):
        writer.append(PER_STEP, step_row(step))
        writer.end_step()
    writer.close()
    # A row holds 57 bytes: two fill the third that is written at once.
    assert load_sketches(tmp_path).steps["step"][:] == [1, 2, 3, 4]


def test_kinds_of_rows_stay_apart(tmp_path):
    writer = SketchWriter(tmp_path, Header(SKETCH))
    writer.append(PER_STEP, step_row(1))
    example = {
        "example_id": torch.tensor([7]),
        "micro_step": torch.tensor([0]),
        "rank": torch.tensor([0]),
        "loss": torch.tensor([0.1]),
        "weight": torch.tensor([1.0]),
    }
    writer.append(PER_EXAMPLE, {**step_row(1), **example})
    writer.flush()
    sketches = load_sketches(tmp_path)
    assert sketches.dataset["example_id"][:] == [7]
    assert "clip_factor" not in sketches.dataset.column_names
