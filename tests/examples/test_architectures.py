"""Rows of every family of models, beside a backward pass for each example."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import (
    FEW,
    MORE,
    DoublePrecision,
    tiny_inputs,
    tiny_model,
)

SIZE = 256
# A pretrained Llama of 260,000 parameters that lies beside some checkouts.
PRETRAINED = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


def single_gradients(model, inputs, index):
    """One example's gradients, by name, from a pass of its own."""
    model.zero_grad()
    model(**{name: x[index : index + 1] for name, x in inputs.items()}).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_rows_are_right(model, inputs, layout):
    sketch = ModelSketch.from_model(model, SIZE, layout)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sketch.coverage().elements == trainable
    with DoublePrecision():
        gradients = [
            single_gradients(model, inputs, i) for i in range(len(inputs["labels"]))
        ]
    expected = [sketch.sketch(some) for some in gradients]
    with DoublePrecision(), ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(inputs)
    for row, wanted in zip(got.rows, expected, strict=True):
        assert (row - wanted).norm() < 1e-9 * wanted.norm()


@pytest.mark.parametrize("layout", ["grouped", "blocked"])
@pytest.mark.parametrize("name", [*FEW, *full(*MORE)])
def test_rows_are_those_of_single_example_passes(name, layout):
    assert_rows_are_right(tiny_model(name), tiny_inputs(name), layout)


@pytest.mark.parametrize("name", [*FEW, *full(*MORE)])
def test_rows_of_batches_whose_size_divides_their_lengths(name):
    inputs = {key: column[:3] for key, column in tiny_inputs(name).items()}
    assert_rows_are_right(tiny_model(name), inputs, "grouped")


@pytest.mark.skipif(not PRETRAINED.exists(), reason="needs the pretrained weights")
@pytest.mark.parametrize("layout", ["grouped", "blocked"])
def test_rows_of_a_pretrained_model(layout):
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float64)
    assert_rows_are_right(model.eval(), tiny_inputs("llama"), layout)
