"""DeepSpeed steps within the backward pass; its rows are those of DDP."""

import json
import os
from unittest.mock import patch

import pytest
import torch

from hf_sketch import load_sketches
from tests.helpers.processes.deepspeed_training import (
    FAMILIES,
    FUSED_LOSSES,
    MICRO_BATCHES,
    STAGES,
    micro_batches_of,
)
from tests.helpers.processes.launching import launch, results
from tests.helpers.rows import assert_same_rows, columns, in_order

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def on_the_cpu():
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        yield


@pytest.fixture(scope="module")
def without(on_the_cpu, tmp_path_factory):
    names = [f"deepspeed/without-{n}" for n in MICRO_BATCHES]
    directory = launch(2, tmp_path_factory.mktemp("ddp"), names)
    return {
        n: load_sketches(directory / f"deepspeed/without-{n}") for n in MICRO_BATCHES
    }


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_those_of_ddp_and_training_is_what_it_was(stage, without, tmp_path):
    names = [f"deepspeed/{stage}", f"deepspeed/plain-{stage}"]
    for name in names:  # a process has one engine
        launch(2, tmp_path, [name])
    watched, plain = (tmp_path / name for name in names)
    wanted = without[micro_batches_of(stage)]
    assert min(columns(wanted.steps)["clip_factor"]) < 0.7  # it is clipped
    assert_same_rows(load_sketches(watched), wanted)
    header = json.loads((watched / "sketches" / "header.json").read_text())
    assert header["unverified"] is None
    assert_same_training(watched, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_in_stage_3_have_the_rows_of_ddp(name, on_the_cpu, tmp_path):
    names = [f"deepspeed/{kind}{name}" for kind in ("", "plain-", "without-")]
    for scenario in names:
        launch(2, tmp_path, [scenario])
    watched, plain, wanted = (tmp_path / scenario for scenario in names)
    assert_same_rows(load_sketches(watched), load_sketches(wanted))
    header = json.loads((watched / "sketches" / "header.json").read_text())
    assert header["unverified"] is None
    assert_same_training(watched, plain)


def assert_same_training(watched, plain):
    """Losses and weights are bit for bit the same."""
    assert results(watched, "curve") == results(plain, "curve")
    for rank in (0, 1):
        got, expected = (torch.load(p / f"parts-{rank}.pt") for p in (watched, plain))
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_rules_are_tried_again_when_gradients_are_zero_no_longer(on_the_cpu, tmp_path):
    names = ("deepspeed/adapters", "deepspeed/adapters-without")
    for name in names:
        launch(2, tmp_path, [name])
    assert_same_rows(*(load_sketches(tmp_path / name) for name in names))


@pytest.fixture(scope="module")
def fused_without(on_the_cpu, tmp_path_factory):
    pytest.importorskip("trl")
    name = "deepspeed/fused-without"
    return load_sketches(launch(2, tmp_path_factory.mktemp("fused"), [name]) / name)


@pytest.mark.parametrize("loss", FUSED_LOSSES)
def test_rows_have_the_gradients_of_a_fused_head(loss, fused_without, tmp_path):
    names = [f"deepspeed/{kind}-{loss}" for kind in ("fused", "plain")]
    for name in names:
        launch(2, tmp_path, [name])
    watched, plain = (tmp_path / name for name in names)
    rows, wanted = (
        in_order(columns(store.dataset))
        for store in (load_sketches(watched), fused_without)
    )
    torch.testing.assert_close(rows["sketch"], wanted["sketch"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows["weight"], wanted["weight"])
    # Examples of equal lengths do not tell a mean of tokens from one of examples.
    assert rows["loss"].isnan().all() == (loss == "loss")
    header = json.loads((watched / "sketches" / "header.json").read_text())
    assert header["unowned"] == 0
    assert_same_training(watched, plain)
