"""Attribution in tasks: the answers of `attribute`, for any parts of the rows."""

import fsspec
import numpy as np
import pytest
import torch
from datasets import Dataset
from pyarrow import BufferReader, parquet

from hf_sketch import load_sketches
from hf_sketch.attribution.cluster.files import StoreFiles, rows_of_files
from hf_sketch.attribution.cluster.stages import attribution_stages
from hf_sketch.attribution.cluster.work import Question, score_shards
from hf_sketch.attribution.methods import Dot
from hf_sketch.attribution.queries import query_matrix
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter
from tests.helpers.rows_in_memory import random_matrix, rows_of
from tests.helpers.stores import HEADER, SKETCH, example_rows

EXAMPLES, EPOCHS = 18, 3
QUERIES = 5


@pytest.fixture(autouse=True)
def _blocks_of_five_rows(monkeypatch):
    monkeypatch.setattr("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * 5)


def write(directory, epochs):
    """A store with a file per step of 3 examples, so that files cross blocks."""
    writer = SketchWriter(directory / "sketches", HEADER)
    generator = torch.Generator().manual_seed(0)
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(EXAMPLES, generator=generator)
        for ids in order.split(3):
            step += 1
            rows = example_rows(step, ids.tolist())
            rows["sketch"] = torch.randn(len(ids), 4, generator=generator)
            rows["sketch"][ids % 6 == 2] = torch.tensor([1.0, -2.0, 3.0, 4.0])  # ties
            rows["sketch"][ids == 7, 0] = torch.nan if epoch == 1 else 1.0
            rows["epoch"] = torch.full((len(ids),), epoch)
            rows["finite"] = rows["sketch"].isfinite().all(1)
            writer.append(PER_EXAMPLE, rows)
            writer.flush()
    writer.close()
    return load_sketches(directory)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return {
        epochs: write(tmp_path_factory.mktemp("stores"), epochs)
        for epochs in (1, EPOCHS)
    }


@pytest.fixture(scope="module")
def queries():
    return rows_of(random_matrix(QUERIES, 1), SKETCH)


def run(stages, order=reversed):
    """Tasks of each stage in another order than that of the rows."""
    for stage in stages:
        for rank in order(range(stage.tasks)):
            assert stage.task("data", rank, stage.tasks) == "data"


def answers(folder):
    return parquet.read_table(folder / "answers.parquet").to_pydict()


def assert_same_answers(folder, expected):
    found, wanted = answers(folder), expected.to_dict()
    assert [*found] == [*wanted]
    scores, others = found.pop("score"), wanted.pop("score")
    np.testing.assert_equal(found, wanted)
    assert scores == others


@pytest.mark.filterwarnings("ignore:Skipped")
@pytest.mark.parametrize("tasks", [1, 3, 100])
@pytest.mark.parametrize(
    ("epochs", "settings"),
    [
        (1, {"method": "dot"}),
        (1, {"method": "cosine", "top_k": 0, "bottom_k": 20}),
        (3, {"method": "dot", "groups": None, "top_k": 30}),
        (3, {"method": "cosine", "bottom_k": 2}),
        (3, {"method": "tracin", "groups": "epoch"}),
        (3, {"bottom_k": 3}),
    ],
)
def test_answers_of_tasks_are_those_of_one_pass(
    tmp_path, stores, queries, tasks, epochs, settings
):
    store = stores[epochs]
    options = {"top_k": 4, **settings}
    stages = attribution_stages(
        store, queries, tmp_path, tasks, joined_at_once=2, **options
    )
    assert stages[0].tasks == min(tasks, -(-len(store) // 5))
    assert stages[-1].tasks == 1
    run(stages)
    assert_same_answers(tmp_path, store.attribute(queries, **options))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_preconditioned_answers_are_those_of_the_formula(tmp_path, stores, queries):
    """The formula in float64 by NumPy, from the rows as a table."""
    table = stores[EPOCHS].dataset.with_format("numpy")[:]
    rows = table["sketch"].astype(np.float64) * table["scale"][:, None]
    finite = np.isfinite(rows).all(1)
    rows, ids = rows[finite], table["example_id"][finite]
    covariance = rows.T @ rows / len(rows)
    damped = covariance + np.eye(4) * 0.5 * np.trace(covariance) / EXAMPLES
    asked = random_matrix(QUERIES, 1).double().numpy()
    scores = asked @ np.linalg.solve(damped, rows.T)
    sums = np.stack([scores[:, ids == i].sum(1) for i in range(EXAMPLES)], 1)
    run(attribution_stages(stores[EPOCHS], queries, tmp_path, 4, 6, damping=0.5))
    found = answers(tmp_path)
    best = -np.sort(-sums, axis=1)[:, :6]
    ids = np.reshape(found["example_id"], best.shape)
    assert all(len(set(line)) == 6 for line in ids.tolist())
    chosen = np.take_along_axis(sums, ids, 1)  # of ties, rounding chooses
    np.testing.assert_allclose(chosen, best, rtol=1e-6)
    np.testing.assert_allclose(found["score"], best.flatten(), rtol=2e-6)


def test_files_alone_answer_what_their_rows_do(stores, queries):
    files = [file["filename"] for file in stores[1].dataset.cache_files[2:4]]
    ids, matrix = query_matrix(stores[1], queries)
    question = Question(ids, matrix, Dot(), 2, 1)
    rows = rows_of_files(files).with_format("numpy")[:]
    scores = (
        random_matrix(QUERIES, 1).numpy()
        @ (rows["sketch"].astype(np.float32) * rows["scale"][:, None]).T
    )
    order = scores.argsort(1)[:, [-1, -2, 0]]
    lines = Dataset(score_shards(files, question))
    assert lines["example_id"][:] == rows["example_id"][order].flatten().tolist()
    some = score_shards(files, question, rows=range(1, 4))
    assert set(some["example_id"].to_pylist()) <= set(rows["example_id"][1:4].tolist())


@pytest.mark.parametrize("count", [1, 3, 8])
def test_parts_are_all_rows_in_order_and_begin_where_blocks_do(stores, count):
    files = StoreFiles.of_store(stores[EPOCHS])
    found, starts = [], []
    for number in range(count):
        with files.part(number, count) as part:
            starts.append(len(found))
            found += part["sketch"][:]
    np.testing.assert_equal(found, stores[EPOCHS].dataset["sketch"][:])
    assert all(start % 5 == 0 for start in starts)


@pytest.mark.filterwarnings("ignore:Skipped")
def test_the_folder_may_be_a_url(stores, queries):
    bucket = fsspec.filesystem("memory")
    run(attribution_stages(stores[1], queries, "memory://job/answers", 2, method="dot"))
    data = bucket.cat_file("/job/answers/answers.parquet")
    found = parquet.read_table(BufferReader(data)).to_pydict()
    bucket.rm("/job", recursive=True)
    assert found == stores[1].attribute(queries, method="dot").to_dict()


def test_a_folder_keeps_to_one_job(tmp_path, stores, queries):
    store = stores[1]
    stages = attribution_stages(store, queries, tmp_path, 2)
    attribution_stages(store, queries, tmp_path, 2)
    others = {
        "queries": (store, rows_of(random_matrix(QUERIES, 2), SKETCH), tmp_path, 2),
        "rows": (stores[EPOCHS], queries, tmp_path, 2),
        "tasks": (store, queries, tmp_path, 3),
    }
    for arguments in others.values():
        with pytest.raises(ValueError, match=r"results for other queries, .* a new fo"):
            attribution_stages(*arguments)
    with pytest.raises(ValueError, match="Pass a new folder, or the same arguments"):
        attribution_stages(store, queries, tmp_path, 2, damping=0.1)
    with pytest.raises(FileNotFoundError, match=r"000000.parquet is missing. Run the"):
        stages[1].task(None, 0, 1)


def test_parts_of_files_and_bad_settings_are_refused(tmp_path, stores, queries):
    store = stores[1]
    for other in (store.where(epoch=0, step=[1, 2]), rows_of(random_matrix(4, 0))):
        with pytest.raises(ValueError, match="as load_sketches returns it, without wh"):
            attribution_stages(other, queries, tmp_path, 2)
    joined = store.join(Dataset.from_dict({"label": [0] * EXAMPLES}), "label")
    with pytest.raises(ValueError, match="as load_sketches returns it, without wh"):
        attribution_stages(joined, queries, tmp_path, 2)
    with pytest.raises(ValueError, match="joined_at_once must be an integer of at lea"):
        attribution_stages(store, queries, tmp_path, 2, joined_at_once=1)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        attribution_stages(store, queries, tmp_path, 2, damping=0.0)


@pytest.mark.filterwarnings("ignore:Skipped")
def test_queries_of_a_model_that_changed_meet_the_nearest_state(tmp_path, stores):
    store = stores[EPOCHS]
    states = {step: rows_of(random_matrix(2, step), SKETCH) for step in (3, 14)}
    options = {"top_k": 5, "method": "tracin", "bottom_k": 1}
    run(attribution_stages(store, states, tmp_path, 3, **options))
    assert_same_answers(tmp_path, store.attribute(states, **options))
