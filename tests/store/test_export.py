"""Exported rows as other programs open them."""

import numpy as np
import pytest
from datasets import load_dataset

from hf_sketch import load_sketches
from hf_sketch.cli import main
from tests.helpers.stores import write_store


@pytest.fixture
def store(tmp_path):
    return load_sketches(write_store(tmp_path / "sketches"))


def exported(store, to):
    output = store.directory.with_name("out")
    main(["export", str(store.directory), "--to", to, "--output_dir", str(output)])
    return output


def decoded(rows):
    """The sketches by the format's definition."""
    table = rows.with_format("numpy")[:]
    return table["sketch"].astype(np.float32) * table["scale"][:, None]


def assert_nearest(ids, store, query):
    """The ids are those of the rows whose sketches are nearest to the query."""
    distances = ((decoded(store.dataset) - np.array(query)) ** 2).sum(1)
    nearest = distances.argsort()[: len(ids)]
    assert ids == np.array(store.dataset["example_id"][:])[nearest].tolist()


def assert_all_columns(columns, store):
    """All columns but the scale are there, with the store's values."""
    names = [name for name in store.dataset.column_names if name != "scale"]
    assert [*columns] == names
    sketches = np.stack([np.asarray(x) for x in columns.pop("sketch")])
    np.testing.assert_array_equal(sketches, decoded(store.dataset))
    for name, values in columns.items():
        assert [*values] == store.dataset[name][:], name


def test_duckdb_reads_the_parquet_file(store):
    duckdb = pytest.importorskip("duckdb")
    path = exported(store, "parquet") / "per_example.parquet"
    rows = duckdb.sql(f"from '{path}'")
    columns = zip(rows.columns, zip(*rows.fetchall(), strict=True), strict=True)
    assert_all_columns(dict(columns), store)
    found = duckdb.sql(
        f"select example_id from '{path}' where step < 4 order by list_distance(sketch,"
        " [0, 300, 600, 900]::float[]) limit 2"
    ).fetchall()
    assert_nearest([row[0] for row in found], store, [0, 300, 600, 900])


def test_polars_reads_the_parquet_file(store):
    polars = pytest.importorskip("polars")
    output = exported(store, "parquet")
    rows = polars.read_parquet(output / "per_example.parquet")
    assert rows["sketch"].dtype == polars.Array(polars.Float32, 4)
    assert_all_columns(rows.to_dict(as_series=False), store)
    steps = polars.read_parquet(output / "per_step.parquet")
    assert steps["step"].to_list() == [1, 2, 3]


def test_lance_reads_its_dataset(store):
    lance = pytest.importorskip("lance")
    rows = lance.dataset(exported(store, "lance") / "per_example.lance")
    assert_all_columns(rows.to_table().to_pydict(), store)
    query = [0.0, 300.0, 600.0, 900.0]
    nearest = {"column": "sketch", "q": np.array(query, dtype=np.float32), "k": 2}
    found = rows.to_table(nearest=nearest, filter="step < 4", columns=["example_id"])
    assert_nearest(found["example_id"].to_pylist(), store, query)


def test_lancedb_opens_the_same_folder(store):
    lancedb = pytest.importorskip("lancedb")
    pytest.importorskip("lance")
    tables = lancedb.connect(exported(store, "lance"))
    query = [0.0, 300.0, 600.0, 900.0]
    found = tables.open_table("per_example").search(query).limit(2).to_list()
    assert_nearest([line["example_id"] for line in found], store, query)
    assert tables.open_table("per_step").count_rows() == 3


def test_lance_is_named_if_it_is_missing(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lance", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-sketch\[lance\]"'):
        exported(store, "lance")
    assert not store.directory.with_name("out").exists()


def test_datasets_loads_the_files_of_a_store(store, tmp_path):
    """As the Hub's viewer does; docs/scale.md has the line."""
    files = str(store.directory / "per_example-*.arrow")
    rows = load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path)
    )
    assert rows[:] == store.dataset[:]
