import pytest
import torch

from hf_sketch import ModelSketch, implicit_sketch
from tests.helpers.trained.training import tiny_batch, tiny_bert


@pytest.mark.parametrize("layout", ["blocked", "factored", "flat"])
def test_implicit_and_explicit_sketches_agree(layout):
    model, batch = tiny_bert().double().eval(), tiny_batch()
    sketch = ModelSketch.from_model(model, 64, layout)
    implicit = implicit_sketch(lambda m: m(**batch).loss, model, sketch)
    assert all(p.grad is None for p in model.parameters())
    model(**batch).loss.backward()
    explicit = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(implicit, explicit, rtol=1e-9, atol=1e-12)


def test_the_implicit_sketch_is_the_derivative_along_lifted_directions():
    model, batch = tiny_bert().double().eval(), tiny_batch()
    sketch = ModelSketch.from_model(model, 64)
    implicit = implicit_sketch(lambda m: m(**batch).loss, model, sketch)
    direction = torch.zeros(64, dtype=torch.float64)
    direction[7] = 1.0
    lifted, losses = sketch.adjoint(direction), []
    step = 1e-5
    for sign in (1, -1):
        moved = tiny_bert().double().eval()
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += sign * step * lifted[name]
        losses.append(float(moved(**batch).loss.detach()))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(implicit[7]), rel=1e-5)


def test_a_sketch_of_another_model_is_named():
    sketch = ModelSketch.from_model(tiny_bert(num_labels=2), 64)
    with pytest.raises(ValueError, match=r"'classifier.weight' with shape"):
        implicit_sketch(lambda m: m(**tiny_batch()).loss, tiny_bert(), sketch)
