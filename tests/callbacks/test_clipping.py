"""What training multiplied its gradients by is found, and undone."""

import pytest
import torch

from hf_sketch import ModelSketch
from hf_sketch.callbacks.recording.steps import GradientsAtOnce, left_gradients
from hf_sketch.model import gradient_pass
from tests.helpers.trained.training import tiny_batch, tiny_bert

SIZE = 256


@pytest.fixture(params=[False, True], ids=["by tensor", "at once"])
def at_once(request, monkeypatch):
    """Whether kernels read all gradients at once, interpreted on the CPU."""
    if request.param:
        pytest.importorskip("triton")
        monkeypatch.setattr(gradient_pass, "can_launch", lambda device: True)
    return request.param


# The Trainer undoes the scale before it clips, and leaves it on where it does not clip.
@pytest.mark.parametrize(
    ("unscaled", "clip_factor"), [(True, 1.0), (True, 0.01), (False, 1.0)]
)
def test_step_rows_under_loss_scaling(unscaled, clip_factor, at_once):
    model, scale = tiny_bert().eval(), 1024.0
    sketch = ModelSketch.from_model(model, SIZE)
    model(**tiny_batch()).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    reader = left_gradients(sketch, sketch.parameters_of(model))
    assert isinstance(reader, GradientsAtOnce) == at_once
    (scale * model(**tiny_batch()).loss).backward()
    reader.note()
    if unscaled:
        for parameter in model.parameters():
            parameter.grad.mul_(clip_factor / scale)
    position = {"epoch": 0, "step": 1, "learning_rate": 1e-3}
    row = reader.columns(position, scale)
    expected = clip_factor * sketch.sketch_rows(
        {name: x.reshape(1, -1) for name, x in plain.items()}
    ).squeeze(0)
    torch.testing.assert_close(row["sketch"][0], expected, rtol=1e-4, atol=1e-5)
    assert float(row["clip_factor"]) == pytest.approx(clip_factor, rel=1e-4)
    norm = torch.cat([g.flatten() for g in plain.values()]).norm()
    assert row["finite"].tolist() == [True]
    assert float(row["gradient_norm"]) == pytest.approx(float(norm), rel=1e-4)


class Shard(torch.nn.Parameter):
    """A parameter that is not whole, as its type says."""


@pytest.mark.parametrize(
    "change",
    [
        lambda p: Shard(p),
        lambda p: torch.nn.Parameter(p.detach()[:1]),
        lambda p: torch.nn.Parameter(p.detach().double()),
    ],
    ids=["type", "shape", "dtype"],
)
@pytest.mark.parametrize("at_once", [True], indirect=True)
def test_parameters_that_kernels_do_not_read_are_read_one_by_one(at_once, change):
    model = tiny_bert()
    sketch = ModelSketch.from_model(model, SIZE)
    parameters = sketch.parameters_of(model)
    assert isinstance(left_gradients(sketch, parameters), GradientsAtOnce)
    name = next(iter(parameters))
    changed = {**parameters, name: change(parameters[name])}
    assert not isinstance(left_gradients(sketch, changed), GradientsAtOnce)
