"""Stores of strangers: nothing outside of their folder is touched or shown."""

import shutil

import pytest

from hf_sketch import load_sketches
from hf_sketch.attribution.record import AttributionRecord, QueryRecord
from hf_sketch.durable import printable, read_sealed, write_sealed
from hf_sketch.recipes.attribute import print_record
from hf_sketch.store.contents import describe
from hf_sketch.store.maintenance import merge, repair
from tests.helpers.stores import GOLDEN, read_lines, write_lines, write_store

ESCAPES = "\x1b]0;mine\x07\x1b[2J \u202e"


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store")


@pytest.fixture
def old_store(tmp_path):
    """One of version 1, which has names of files in its manifest."""
    shutil.copytree(GOLDEN[1], tmp_path / "old")
    return tmp_path / "old"


def change(store, edit):
    path = store / "manifest-00000.json"
    content = read_sealed(path)
    edit(content)
    write_sealed(path, content)


@pytest.mark.parametrize("absolute", [False, True])
def test_files_outside_of_a_store_are_refused_and_stay(old_store, tmp_path, absolute):
    store = old_store
    victim = tmp_path / "victim-00000-00001.arrow"
    victim.write_text("precious")
    name = str(victim) if absolute else f"../{victim.name}"
    change(store, lambda content: content["shards"][0].update(file=name))
    for action in (
        lambda: load_sketches(store),
        lambda: load_sketches(f"file://{store}"),
        lambda: merge([store], tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="which is no file of this store: get"):
            action()
    repair(store)
    assert victim.read_text() == "precious"
    assert len(load_sketches(store)) == 6  # of the files that are there


def test_kinds_with_a_path_are_refused(old_store, tmp_path):
    kind = "../../escaped"
    change(old_store, lambda content: content["shards"][0].update(kind=kind))
    with pytest.raises(ValueError, match=r"shards\[0\].kind is '../../escaped', not"):
        merge([old_store], tmp_path / "deep" / "merged")
    assert not list(tmp_path.parent.glob("escaped*"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, "../../escaped"),
        (0, "header"),
        (1, "../1"),
        (1, -1),
        (1, True),
        (2, "2"),
        (5, None),
        (8, 0),
    ],
)
def test_lines_that_list_what_is_no_file_are_refused(store, tmp_path, place, value):
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    contents[1]["shards"][0][place] = value
    write_lines(path, contents)
    for action in (
        lambda: load_sketches(store),
        lambda: load_sketches(f"file://{store}"),
        lambda: merge([store], tmp_path / "deep" / "merged"),
        lambda: write_store(store),
    ):
        with pytest.raises(ValueError, match=rf"shards\[0\]\[{place}\] is .*, not "):
            action()
    assert not list(tmp_path.parent.glob("escaped*"))
    assert len(repair(store)) == 1
    assert len(load_sketches(store)) == 6


def test_a_manifest_of_another_process_is_refused(store):
    path = store / "manifest-00000.jsonl"
    path.rename(store / "manifest-00001.jsonl")
    with pytest.raises(ValueError, match="lists files of process 0, which is no file"):
        load_sketches(store)


def test_a_copy_of_a_store_opens(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    assert len(load_sketches(tmp_path / "copy")) == 6


def test_texts_of_a_store_do_not_reach_the_terminal_raw(store, capsys):
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    contents[-1]["gaps"] = [[9, ESCAPES, None]]
    write_lines(path, contents)
    with pytest.warns(UserWarning, match="has no rows") as caught:
        load_sketches(store)
    line = {"query": 0, "rank": 0, "example_id": 1, "score": 1.0, "text": ESCAPES}
    query = QueryRecord(0, ESCAPES, 1.0, [line], [], [], [])
    print_record(AttributionRecord("dot", [query]))
    shown = [str(caught[0].message), describe(store), capsys.readouterr().out]
    for text in shown:
        assert not set("\x1b\x07\u202e") & set(text)
        assert "\\x1b]0;mine\\x07" in text


def test_what_can_be_shown_stays_as_it_is():
    text = "Łódź, 東京\tand\nعربي: 1 + 1 = 2"
    assert printable(text) == text
