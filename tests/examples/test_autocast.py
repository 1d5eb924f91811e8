"""Sketches under autocast: the model computes in 16 bits, and its rows do not."""

import pytest
import torch

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model

SIZE = 256


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "operator"),
    [
        ("grouped", "srht"),
        ("blocked", "srht"),
        *full(("factored", "qk"), ("blocked", "affd"), ("flat", "qk"), ("flat", "fjl")),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", *full("llama", "bert", "mixtral")])
def test_rows_are_the_same_if_the_backward_pass_is_within(name, layout, operator):
    model, batch = tiny_model(name, torch.float32), tiny_inputs(name)
    sketch = ModelSketch.from_model(model, SIZE, layout, 0, operator)
    with ExampleSketcher(model, sketch) as sketcher:
        with bfloat16():
            loss = model(**batch).loss
        loss.backward()
        expected = sketcher.take()
    with bfloat16(), ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(batch)
    assert got.rows.dtype == torch.float32
    torch.testing.assert_close(got.rows, expected.rows, rtol=0, atol=0)


@pytest.mark.parametrize("operator", ["affd", "srht", "qk", "dense"])
def test_gradients_and_products_are_those_without_it(operator):
    model = tiny_model("gpt2", torch.float32)
    model(**tiny_inputs("gpt2")).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    sketch = ModelSketch.from_model(model, SIZE, "flat", 0, operator)
    expected = sketch.sketch(gradients)
    lifted = sketch.adjoint(expected)
    with bfloat16():
        assert torch.equal(sketch.sketch(gradients), expected)
        for name, own in sketch.adjoint(expected).items():
            assert torch.equal(own, lifted[name])
