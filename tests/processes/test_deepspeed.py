"""DeepSpeed steps within the backward pass; its rows are those of DDP."""

import os
from unittest.mock import patch

import pytest
import torch

from hf_sketch import load_sketches
from tests.helpers.processes.deepspeed_training import STAGES
from tests.helpers.processes.launching import launch, results, run_together
from tests.helpers.rows import assert_same_rows

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def on_the_cpu():
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        yield


@pytest.fixture(scope="module")
def without(on_the_cpu, tmp_path_factory):
    directory = launch(2, tmp_path_factory.mktemp("ddp"), ["deepspeed/without"])
    return load_sketches(directory / "deepspeed" / "without")


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_those_of_ddp_and_training_is_what_it_was(stage, without, tmp_path):
    names = [f"deepspeed/{stage}", f"deepspeed/plain-{stage}"]
    for name in names:  # a process has one engine
        launch(2, tmp_path, [name])
    watched, plain = (tmp_path / name for name in names)
    assert_same_rows(load_sketches(watched), without)
    assert results(watched, "curve") == results(plain, "curve")
    weights = [torch.load(path / "weights-0.pt") for path in (watched, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("stage", [0, 3])
def test_other_stages_are_refused_by_name(stage, on_the_cpu, tmp_path):
    code, errors, _ = run_together(2, tmp_path, [f"deepspeed/{stage}"])
    assert code != 0
    assert f"does not support stage {stage} of DeepSpeed's ZeRO. Train" in errors
