"""Training whose steps are read by kernels for all tensors at once."""

import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.model import gradient_pass
from hf_sketch.sketches.multi_tensor.gradient_pass import GradientPass
from tests.helpers.trained.training import tiny_trainer

pytest.importorskip("triton")

STEPS = 2


def train(directory, operator):
    """Rows and weights of a run with clipping and two batches in a step."""
    callback = GradientSketchCallback(64, per_example=False, operator=operator)
    trainer = tiny_trainer(directory, callback, max_steps=STEPS, save_strategy="no")
    trainer.train()
    rows = load_sketches(directory).steps.with_format("torch")[:]
    return rows, list(trainer.model.parameters())


@pytest.mark.parametrize("operator", ["srht", "affd"])
def test_steps_have_the_rows_that_they_have_tensor_by_tensor(
    operator, tmp_path, monkeypatch
):
    expected, plain = train(tmp_path / "plain", operator)
    monkeypatch.setattr(gradient_pass, "can_launch", lambda device: True)
    finish, finished = GradientPass.finish, []

    def noted(*args):
        finished.append(args)
        return finish(*args)

    monkeypatch.setattr(GradientPass, "finish", noted)
    rows, weights = train(tmp_path / "kernels", operator)
    assert len(finished) == STEPS
    assert rows.keys() == expected.keys()
    assert expected["clip_factor"].max() < 1
    for name, column in expected.items():
        torch.testing.assert_close(rows[name], column, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, weights, plain))
