"""Kernels move all of a model's weights along a subspace at once."""

import pytest
import torch
from torch import nn

from hf_sketch import ModelSketch
from hf_sketch.sketches.multi_tensor.lift import Lift
from hf_sketch.subspace.weights import MovedWeights
from tests.helpers.launches import note_launches

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUT_SIZE = 64


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, wherever tensors are."""
    return note_launches(monkeypatch, Lift)


def moved(dtype=torch.float32, transposed=False):
    """Weights that moved twice, the parameters, and theta in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)).to(DEVICE, dtype)
    if transposed:
        model[0].weight.data = model[0].weight.data.T
    parameters = dict(model.named_parameters())
    sketch = ModelSketch.from_model(model, OUT_SIZE, "grouped")
    weights = MovedWeights()
    for _ in range(2):
        vector = torch.randn(OUT_SIZE).to(DEVICE)
        weights.move(parameters, sketch, vector)
    lifted = dict(sketch.adjoint_parts(vector.cpu().double()))
    theta = {n: p.detach().cpu().double() + lifted[n] for n, p in parameters.items()}
    return weights, parameters, theta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_weights_move_from_theta0_in_the_same_launches(dtype, launched):
    weights, parameters, theta = moved(dtype)
    assert launched == 2 * ["lift_blocks", "lift_matrices", "spread"]
    for name, parameter in parameters.items():
        there = weights.at(name, parameter)
        assert there.dtype == dtype
        limit = torch.finfo(dtype).eps * (1 + theta[name].abs())
        assert ((there.detach().cpu().double() - theta[name]).abs() <= 4 * limit).all()


def test_weights_that_do_not_lie_in_one_piece_move_one_by_one(launched):
    weights, parameters, theta = moved(transposed=True)
    assert not launched
    for name, parameter in parameters.items():
        there = weights.at(name, parameter).detach().cpu().double()
        torch.testing.assert_close(there, theta[name], rtol=1e-5, atol=1e-5)
