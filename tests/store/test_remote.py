"""Stores at URLs, on a file system in memory and on a web server."""

import functools
import http.server
import threading

import fsspec
import pytest
from huggingface_hub import constants

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import HEADER, SKETCH, example_rows, write_store

URL = "memory://bucket/run"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A file system in memory, and the files that are fetched from it."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    files = fsspec.filesystem("memory")
    fetched = []
    get = type(files).get

    def noted(self, paths, *arguments, **options):
        fetched.extend(path.rpartition("/")[2] for path in paths)
        return get(self, paths, *arguments, **options)

    monkeypatch.setattr(type(files), "get", noted)
    yield fetched
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def put(directory):
    fsspec.filesystem("memory").put(f"{directory}/", f"{URL}/sketches/", recursive=True)


def shards(names):
    return sorted(name for name in names if name.endswith(".arrow"))


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/sketches"])
def test_a_store_at_a_url_opens_like_one_on_disk(tmp_path, bucket, url):
    put(write_store(tmp_path / "sketches"))
    here, there = load_sketches(tmp_path), load_sketches(url)
    assert there.model_sketch == here.model_sketch
    assert there.dataset[:] == here.dataset[:]
    assert there.steps[:] == here.steps[:]


def test_rows_that_are_there_are_not_fetched_again(tmp_path, bucket):
    directory = write_store(tmp_path / "sketches", steps=(1, 2))
    put(directory)
    assert len(load_sketches(URL).dataset) == 4
    known = shards(bucket)
    assert known == sorted(p.name for p in directory.glob("*.arrow"))
    bucket.clear()
    live = SketchWriter(directory, HEADER, resume_step=2)
    live.append(PER_EXAMPLE, example_rows(3, [300, 310]))
    live.flush()  # and the run goes on
    put(directory)
    assert load_sketches(URL).dataset["step"][:] == [1, 1, 2, 2, 3, 3]
    new = sorted(p.name for p in directory.glob("*.arrow") if p.name not in known)
    assert shards(bucket) == new
    assert "manifest-00000.jsonl" in bucket
    live.close()


def test_another_run_at_the_same_url_is_fetched_whole(tmp_path, bucket):
    put(write_store(tmp_path / "one" / "sketches"))
    assert load_sketches(URL).dataset["step"][:] == [1, 1, 2, 2, 3, 3]
    bucket.clear()
    other = write_store(tmp_path / "other" / "sketches", steps=(4, 5, 6))
    put(other)
    assert load_sketches(URL).dataset["step"][:] == [4, 4, 5, 5, 6, 6]
    assert shards(bucket) == sorted(p.name for p in other.glob("*.arrow"))


def test_what_was_cut_off_is_fetched_again(tmp_path, bucket):
    put(write_store(tmp_path / "sketches"))
    store = load_sketches(URL)
    expected = store.dataset[:]
    path = sorted(store.directory.glob("per_example*.arrow"))[0]
    path.write_bytes(path.read_bytes()[:100])
    bucket.clear()
    assert load_sketches(URL).dataset[:] == expected
    assert shards(bucket) == [path.name]


def test_bad_urls_are_named(tmp_path, bucket):
    with pytest.raises(FileNotFoundError, match=r"No sketches at memory://bucket/run"):
        load_sketches(URL)
    put(write_store(tmp_path / "sketches"))
    with pytest.raises(ValueError, match=r"repair takes directories, got \['memory"):
        main(["repair", URL])


def test_the_commands_read_urls(tmp_path, bucket, capsys):
    put(write_store(tmp_path / "sketches"))
    main(["info", URL])
    assert "per_example: 6 rows in 3 files" in capsys.readouterr().out
    main(["verify", URL])
    assert "nothing differs" in capsys.readouterr().out


def test_a_store_on_a_web_server_is_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("aiohttp")
    write_store(tmp_path / "run" / "sketches")
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=tmp_path / "run"
    )
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/"
        there = load_sketches(url)
        server.shutdown()
    assert there.dataset[:] == load_sketches(tmp_path / "run").dataset[:]
    assert HEADER.model_sketch == there.model_sketch == SKETCH
