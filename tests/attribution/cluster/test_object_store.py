"""A store in a bucket, scored by tasks that share nothing but the bucket."""

import fsspec
import pytest
from huggingface_hub import constants
from pyarrow import BufferReader, parquet

from hf_sketch import load_sketches
from hf_sketch.attribution.cluster.stages import attribution_stages
from hf_sketch.store.upload import upload_store
from tests.helpers.rows_in_memory import random_matrix, rows_of
from tests.helpers.stores import SKETCH, write_store

RUN = "s3://bucket/run"


@pytest.fixture(scope="module")
def server():
    """A server on this machine that speaks S3, and its file system."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield fsspec.filesystem("s3")
        server.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """An empty bucket, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    server.mkdir("bucket")
    yield server
    server.rm("bucket", recursive=True)


def test_a_store_in_a_bucket_opens_like_one_on_disk(tmp_path, bucket):
    write_store(tmp_path / "sketches")
    upload_store(tmp_path / "sketches", f"{RUN}/sketches")
    here, there = load_sketches(tmp_path), load_sketches(RUN)
    assert there.model_sketch == here.model_sketch
    assert there.dataset[:] == here.dataset[:]
    assert there.steps[:] == here.steps[:]


def test_tasks_need_nothing_but_the_bucket(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * 4)
    write_store(tmp_path / "sketches", steps=range(1, 7))
    upload_store(tmp_path / "sketches", f"{RUN}/sketches")
    store, queries = load_sketches(RUN), rows_of(random_matrix(3, 0), SKETCH)
    expected = store.attribute(queries, 4).to_dict()
    stages = attribution_stages(store, queries, f"{RUN}/answers", 3, 4, url=RUN)
    for path in store.directory.glob("*.arrow"):
        path.unlink()  # as on another machine
    for stage in stages:
        for rank in range(stage.tasks):
            stage.task(None, rank, stage.tasks)
    data = bucket.cat_file(f"{RUN}/answers/answers.parquet")
    assert parquet.read_table(BufferReader(data)).to_pydict() == expected


def test_a_file_that_was_replaced_since_is_named(tmp_path, bucket):
    write_store(tmp_path / "sketches")
    upload_store(tmp_path / "sketches", f"{RUN}/sketches")
    store, queries = load_sketches(RUN), rows_of(random_matrix(1, 0), SKETCH)
    stages = attribution_stages(store, queries, tmp_path / "answers", 1, url=RUN)
    (path, *_) = sorted(write_store(tmp_path / "other", range(4, 5)).glob("per_e*"))
    bucket.put(str(path), f"{RUN}/sketches/per_example-00000-000001.arrow")
    with pytest.raises(ValueError, match=r"000001.arrow was changed: the checksum of"):
        stages[0].task(None, 0, 1)
