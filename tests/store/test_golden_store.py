"""A store of each version of the format opens in every later one."""

import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.durable import read_sealed
from hf_sketch.store.blocks import sketch_matrix
from hf_sketch.store.header import READERS
from hf_sketch.store.maintenance import find_problems
from tests.helpers.stores import GOLDEN, SKETCH


@pytest.mark.parametrize("version", GOLDEN)
def test_the_golden_store_is_whole_and_has_its_rows(version):
    assert find_problems(GOLDEN[version]) == []
    store = load_sketches(GOLDEN[version])
    assert store.model_sketch == SKETCH
    rows = store.dataset.with_format("torch")[:]
    assert rows["example_id"].tolist() == [100, 101, 200, 201, 300, 301]
    assert rows["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert rows["weight"].tolist() == [1.0] * 6
    assert rows["learning_rate"].tolist() == [0.5] * 6
    expected = torch.outer(rows["example_id"] + 1.0, torch.arange(4.0))
    expected += rows["step"].unsqueeze(1)
    # These whole numbers have 11 bits at most, which float16 keeps.
    assert torch.equal(sketch_matrix(store.dataset), expected)
    assert torch.equal(
        sketch_matrix(store.steps), torch.arange(4.0) + torch.arange(1.0, 4.0)[:, None]
    )
    assert store.steps["clip_factor"][:] == [0.5] * 3


def test_a_store_of_each_version_is_kept():
    headers = {v: read_sealed(path / "header.json") for v, path in GOLDEN.items()}
    assert {v: content["format_version"] for v, content in headers.items()} == {
        version: version for version in READERS
    }
