"""What files of a store claim is checked before anything uses it."""

import json
import shutil
import struct

import pyarrow as pa
import pytest
import xxhash

from hf_sketch import load_sketches
from hf_sketch.durable import read_sealed, write_sealed
from hf_sketch.store.log import read_manifests
from hf_sketch.store.maintenance import find_problems
from tests.helpers.stores import read_lines, write_lines, write_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("claims") / "sketches")


@pytest.fixture
def store(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "sketches")
    return tmp_path / "sketches"


def replace_rows(store, data, rows=2, head_bytes=None):
    """Put other bytes into the first file of rows, with checksums that fit."""
    (store / "per_example-00000-000001.arrow").write_bytes(data)
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    entry = contents[1]["shards"][0]
    head = entry[6] if head_bytes is None else head_bytes
    digests = [xxhash.xxh3_128_hexdigest(part) for part in (data[:head], data)]
    contents[1]["shards"][0] = [*entry[:2], rows, 1, 1, len(data), head, *digests]
    write_lines(path, contents)


def head_of(data):
    *_, batch = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
    return len(data) - 8 - batch.body.size


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss", None, "loss is None, not one of"),
        ("row_dtype", "float64", "row_dtype is 'float64', not one of"),
        ("per_row", 1, "per_row is 1, not true or false"),
        ("processes", 10**9, "processes is 1000000000, not a whole number"),
        ("check_value", [[]], r"check_value\[0\] is \[\], not a number"),
        ("measured_error", {"examples": 1}, "measured_error.pearson_r is missing"),
        ("model_sketch.out_size", 2**40, "model_sketch.out_size is 1099511627776, not"),
        ("model_sketch.out_size", 41, r"out_size must be in \[1, 40\]"),
        ("model_sketch.shapes", [["a"]], r"shapes\[0\] is \['a'\], not a list of 2"),
        ("model_sketch.shapes", [["a", [-1]]], r"shapes\[0\]\[1\]\[0\] is -1, not a"),
        ("model_sketch.blocks", 3, "model_sketch.'blocks' is unknown"),
    ],
)
def test_headers_that_claim_what_cannot_be_are_refused(store, field, value, said):
    content = read_sealed(store / "header.json")
    *outer, name = field.split(".")
    changed = content[outer[0]] if outer else content
    changed[name] = value
    write_sealed(store / "header.json", content)
    with pytest.raises(ValueError, match=rf"header.json.*{said}") as error:
        load_sketches(store)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["loss", "model_sketch", "check_value"])
def test_headers_without_a_field_are_refused(store, name):
    content = read_sealed(store / "header.json")
    del content[name]
    write_sealed(store / "header.json", content)
    with pytest.raises(ValueError, match=f"header.json: {name} is missing"):
        load_sketches(store)


def test_fields_of_later_releases_are_ignored(store):
    content = read_sealed(store / "header.json")
    write_sealed(store / "header.json", {**content, "weather": "rain"})
    assert len(load_sketches(store)) == 6


@pytest.mark.parametrize(
    "inner",
    ["[" * 20_000 + "]" * 20_000, "[" + "[]," * 10**5 + "0]"],
    ids=["deep", "dense"],
)
def test_deep_and_dense_json_is_refused(store, inner):
    path = store / "header.json"
    text = path.read_text().replace('"mean"', inner)
    blank = text[:16] + "0" * 32 + text[48:]
    digest = xxhash.xxh3_128_hexdigest(blank.encode())
    path.write_text(text[:16] + digest + text[48:])
    with pytest.raises(ValueError, match=r"header.json (is no JSON|has too many)"):
        load_sketches(store)


@pytest.mark.parametrize("layout", ["grouped", "flat", "factored"])
def test_maps_of_any_size_take_no_time(store, layout):
    content = read_sealed(store / "header.json")
    sketch = {"shapes": [["a", [10**8, 10**8]]], "layout": layout}
    content["model_sketch"] |= sketch
    write_sealed(store / "header.json", content)
    assert load_sketches(store).model_sketch.in_size == 10**16


def test_a_process_of_a_billion_is_refused(store):
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    contents[0]["world_size"] = 10**9
    write_lines(path, contents)
    with pytest.raises(ValueError, match=r"jsonl: world_size is 1000000000, not"):
        load_sketches(store)


@pytest.mark.parametrize("claimed", [3, 10**9])
def test_rows_that_a_file_has_no_bytes_for_are_refused(store, claimed):
    path = store / "per_example-00000-000001.arrow"
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<i", data, 4)[0]
    head = data[start : head_of(data)].replace(
        struct.pack("<q", 2), struct.pack("<q", claimed)
    )
    replace_rows(store, data[:start] + head + data[start + len(head) :], claimed)
    with pytest.raises(ValueError, match=r"1.arrow is no Arrow file of rows"):
        load_sketches(store, verify=False)
    assert find_problems(store)


def test_columns_that_are_shorter_than_their_rows_are_refused(store):
    path = store / "per_example-00000-000001.arrow"
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<i", data, 4)[0]
    lengths = data[start : head_of(data)].replace(
        struct.pack("<q", 16), struct.pack("<q", 1)
    )
    replace_rows(store, data[:start] + lengths + data[start + len(lengths) :])
    with pytest.raises(ValueError, match=r"1.arrow is no .* a column lies at"):
        load_sketches(store)


def test_a_file_has_as_many_rows_as_its_manifest_says(store):
    replace_rows(store, (store / "per_example-00000-000001.arrow").read_bytes(), 3)
    with pytest.raises(ValueError, match=r"has 2 rows from .* says 3 rows from"):
        load_sketches(store)


def other_files(store):
    """Files of Arrow that the library does not write."""
    table = pa.ipc.open_stream(store / "per_example-00000-000001.arrow").read_all()
    names = {"dtype": "int64", "_type": "ClassLabel", "names_file": "/etc/hosts"}
    described = json.loads(table.schema.metadata[b"huggingface"])
    described["info"]["features"]["example_id"] = names
    nulls = pa.array([None, 1.0], pa.float32())
    coded = pa.array(["a", "a"]).dictionary_encode()
    wide = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 4), 2)
    loss = table.column_names.index("loss")
    text = {"huggingface": json.dumps(described)}
    return {
        "metadata that name a file": table.replace_schema_metadata(text),
        "no metadata": table.replace_schema_metadata(None),
        "nulls": table.set_column(loss, "loss", nulls),
        "a dictionary": table.set_column(loss, "loss", coded),
        "texts": table.set_column(loss, "loss", pa.array(["a", "b"])),
        "lists": table.set_column(loss, "loss", wide),
        "one column less": table.drop(["loss"]),
        "two batches": pa.concat_tables([table[:1], table[1:]]),
        "compression": table,
    }


@pytest.mark.parametrize(
    "what",
    [
        "metadata that name a file",
        "no metadata",
        "nulls",
        "a dictionary",
        "texts",
        "lists",
        "one column less",
        "two batches",
        "compression",
    ],
)
def test_files_with_other_columns_are_refused(store, what):
    table = other_files(store)[what]
    sink = pa.BufferOutputStream()
    codec = "zstd" if what == "compression" else None
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    replace_rows(store, data, head_bytes=head_of(data))
    with pytest.raises(ValueError, match=r"1.arrow (is no Arrow file|has the col)"):
        load_sketches(store)


def test_a_file_that_is_listed_twice_is_refused(store):
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    contents[2]["shards"][0] = contents[1]["shards"][0]
    write_lines(path, contents)
    with pytest.raises(ValueError, match="lists a file twice"):
        read_manifests(store)
