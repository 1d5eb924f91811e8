"""No byte of a store can change, and no file be cut, unnoticed."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sketch import load_sketches
from hf_sketch.store.header import Header
from hf_sketch.store.maintenance import find_problems, repair
from hf_sketch.store.rows import PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import SKETCH, step_row, write_steps


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "sketches"
    writer = SketchWriter(directory, Header(SKETCH))
    for step in (1, 2, 3):
        writer.append(PER_STEP, step_row(step))
        writer.flush()
    writer.close()
    return directory


@pytest.fixture(scope="module")
def contents(store):
    return {path: path.read_bytes() for path in sorted(store.iterdir())}


def damage(data, how, place, bit):
    """Flip a bit, cut the file, or lengthen it."""
    at = place % len(data)
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
    return data[:at] if how == "cut" else data + data[: 1 + at]


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.full)])
def test_every_change_is_found_and_no_wrong_row_is_given(store, contents, cases):
    @settings(max_examples=cases, deadline=None, database=None, derandomize=True)
    @given(
        which=st.integers(0, 4),
        how=st.sampled_from(["flip", "flip", "flip", "cut", "lengthen"]),
        place=st.integers(0, 2**20),
        bit=st.integers(0, 7),
    )
    def change(which, how, place, bit):
        path = list(contents)[which]
        path.write_bytes(damage(contents[path], how, place, bit))
        try:
            assert find_problems(store)
            if path.suffix == ".jsonl" and how != "flip":
                assert_the_latest_flush_is_lost_at_most(store, path)
                return
            with pytest.raises(ValueError, match=path.name):
                load_sketches(store)
        finally:
            path.write_bytes(contents[path])

    change()


def assert_the_latest_flush_is_lost_at_most(store, path):
    """What a crash leaves of the last line of a manifest counts for nothing."""
    try:
        steps = load_sketches(store).steps["step"][:]
    except ValueError:
        with pytest.raises(ValueError, match=path.name):
            load_sketches(store)
    else:
        assert steps in ([1, 2], [1, 2, 3])


def test_the_heads_of_large_stores_are_compared_too(store, contents, monkeypatch):
    monkeypatch.setattr("hf_sketch.attribution.loading._VERIFIED_BYTES", 0)
    path = list(contents)[-1]
    try:
        path.write_bytes(damage(contents[path], "flip", 40, 0))
        with (
            pytest.warns(UserWarning, match="Skipping the checksums .* verify=True"),
            pytest.raises(ValueError, match="checksum of its first"),
        ):
            load_sketches(store)
        path.write_bytes(damage(contents[path], "flip", len(contents[path]) - 20, 0))
        with pytest.raises(ValueError, match=path.name):
            load_sketches(store, verify=True)
        assert len(load_sketches(store, verify=False).steps) == 3
    finally:
        path.write_bytes(contents[path])


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("which", ["per_step-00000-000002.arrow", "manifest"])
def test_a_repaired_store_opens_and_nothing_is_deleted(
    tmp_path, store, contents, which, how
):
    copy = tmp_path / "sketches"
    shutil.copytree(store, copy)
    (path,) = copy.glob(f"{which}*")
    broken = damage(path.read_bytes(), how, 300, 3)
    path.write_bytes(broken)
    done = repair(copy)
    assert len(done) == 1
    assert path.name in done[0]
    assert (copy / "damaged" / path.name).read_bytes() == broken
    if which == "manifest":
        assert not find_problems(copy)
        assert load_sketches(copy).steps["step"][:] == [1, 2, 3]
    else:
        with pytest.warns(UserWarning, match=r"no rows of steps 2 to 2: .*damaged"):
            assert load_sketches(copy).steps["step"][:] == [1, 3]
    assert repair(copy) == []


def test_a_repaired_store_goes_on(tmp_path, store):
    copy = tmp_path / "sketches"
    shutil.copytree(store, copy)
    (copy / "per_step-00000-000002.arrow").write_bytes(b"")
    repair(copy)
    write_steps(copy, [4], resume_step=3)
    with pytest.warns(UserWarning, match="no rows of steps 2 to 2"):
        assert load_sketches(copy).steps["step"][:] == [1, 3, 4]
