"""Stores that are copied to a URL, at once or while a run writes them."""

import fsspec
import pytest
from huggingface_hub import constants

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.upload import upload_store
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import HEADER, SKETCH, example_rows, write_store

URL = "memory://bucket/run"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A file system in memory."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def go_on(directory, steps, resume_step, **settings):
    writer = SketchWriter(directory, HEADER, resume_step=resume_step, **settings)
    for step in steps:
        writer.append(PER_EXAMPLE, example_rows(step, [100 * step, 100 * step + 1]))
        writer.flush()
    writer.close()


def test_an_uploaded_store_opens_like_the_one_on_disk(tmp_path, files, capsys):
    write_store(tmp_path / "sketches")
    (tmp_path / "sketches" / "per_example-00000-000099.arrow.tmp").write_bytes(b"half")
    main(["upload", str(tmp_path), "--url", URL])
    assert "sent 6 files of rows to memory://bucket/run" in capsys.readouterr().out
    here, there = load_sketches(tmp_path), load_sketches(URL)
    assert there.model_sketch == here.model_sketch
    assert there.dataset[:] == here.dataset[:]
    assert there.steps[:] == here.steps[:]
    assert not [name for name in files.ls("/bucket/run", detail=False) if "tmp" in name]


def test_only_what_is_new_is_sent(tmp_path, files):
    directory = write_store(tmp_path / "sketches", steps=(1, 2))
    assert len(upload_store(directory, URL)) == 4
    assert upload_store(directory, URL) == []
    before = set(directory.glob("*.arrow"))
    go_on(directory, [3], resume_step=2)
    (new,) = set(directory.glob("*.arrow")) - before
    assert upload_store(directory, URL) == [new.name]
    assert load_sketches(URL).dataset["step"][:] == [1, 1, 2, 2, 3, 3]


def test_rows_that_training_has_dropped_go(tmp_path, files):
    directory = write_store(tmp_path / "sketches", steps=(1, 2, 3))
    upload_store(directory, URL)
    go_on(directory, [2], resume_step=1)
    upload_store(directory, URL)
    assert load_sketches(URL).dataset[:] == load_sketches(directory).dataset[:]
    shards = [f for f in files.ls("/bucket/run", detail=False) if f.endswith(".arrow")]
    assert {f.rpartition("/")[2] for f in shards} == {
        path.name for path in directory.glob("*.arrow")
    }


def test_an_upload_that_is_cut_off_anywhere_leaves_the_rows_before(
    tmp_path, files, monkeypatch
):
    directory = write_store(tmp_path / "sketches", steps=(1, 2))
    put = type(files).put_file
    for before in (None, [1, 1, 2, 2]):
        whole = load_sketches(directory).dataset["step"][:]
        for left in range(20):
            with monkeypatch.context() as broken:
                broken.setattr(type(files), "put_file", cut_off(put, left))
                try:
                    upload_store(directory, URL)
                except ConnectionError:
                    assert found(files) in (before, whole)
                else:
                    break
        assert left > 2
        assert found(files) == whole
        go_on(directory, [3], resume_step=2)


def cut_off(put, left):
    """Uploads files until the connection breaks."""
    count = [left]

    def broken(self, *arguments, **options):
        count[0] -= 1
        if count[0] < 0:
            raise ConnectionError
        return put(self, *arguments, **options)

    return broken


def found(files):
    if not files.isfile("/bucket/run/header.json"):
        return None
    return load_sketches(URL).dataset["step"][:]


@pytest.mark.filterwarnings("ignore:.*has no rows of the processes")
def test_machines_upload_their_processes_to_one_url(tmp_path, files):
    for rank in (0, 1):
        directory = write_store(tmp_path / f"{rank}", rank=rank, world_size=2)
        upload_store(directory, URL)
    upload_store(tmp_path / "0", URL)
    assert load_sketches(URL).dataset["rank"][:] == [0, 0, 1, 1] * 3


def test_the_store_of_another_run_is_refused(tmp_path, files):
    upload_store(write_store(tmp_path / "one"), URL)
    other = write_store(tmp_path / "other", steps=(4, 5))
    with pytest.raises(
        ValueError, match=r"memory://bucket/run holds the store of anot"
    ):
        upload_store(other, URL)
    header = Header(SKETCH, row_dtype="float16", loss="sum")  # and the same rows
    settings = write_store(tmp_path / "sum", header=header)
    with pytest.raises(ValueError, match="Pass a new URL, or remove it"):
        upload_store(settings, URL)
    assert load_sketches(URL).dataset["step"][:] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="upload takes one store, got 2: call it for"):
        main(["upload", str(other), str(settings), "--url", URL])
