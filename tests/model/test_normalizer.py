"""Gradients divided by the roots of Adam's second moments, before they are sketched."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import Grouped
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model

SIZE = 64
EPS = 1e-8  # AdamW's default
TOKENS = torch.arange(24).view(4, 6) * 7 % 40


class Mixed(nn.Module):
    """An embedding, convolutions, a layer norm, and a head that is its own module."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 12)
        self.along = nn.Conv1d(12, 10, 3, padding=1)
        self.image = nn.Conv2d(1, 3, 3)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)
        self.other = nn.Linear(24, 5)

    def forward(self, input_ids, labels):
        words = self.words(input_ids)
        hidden = self.norm(self.along(words.mT).mT)
        places = self.image(words.unsqueeze(1)).flatten(1)[:, :24]
        logits = self.head(hidden.mean(1)) + self.other(places)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def trained(kind=torch.optim.AdamW, steps=3):
    """A model, an optimizer that has stepped, and a batch."""
    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = kind(model.parameters(), lr=1e-2)
    batch = {"input_ids": TOKENS, "labels": torch.tensor([0, 3, 1, 1])}
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return model, optimizer, batch


def divided(model, optimizer, steps=3):
    """The gradients, divided by the roots of rank-one second moments."""
    found = {}
    for name, parameter in model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**steps)
        if moment.dim() > 1:
            matrix = moment.flatten(0, 1) if moment.dim() == 3 else moment.flatten(1)
            rows, columns = matrix.mean(1, keepdim=True), matrix.mean(0)
            moment = (rows * columns / matrix.mean()).view(moment.shape)
        root = (moment + EPS**2).sqrt()
        found[name] = (parameter.grad / root).where(moment > 0, 0)
    return found


@pytest.mark.parametrize("layout", ["grouped", "factored", "blocked", "flat"])
def test_rows_are_sketches_of_divided_gradients(layout, caplog):
    caplog.set_level(logging.INFO, "hf_sketch.examples")
    model, optimizer, batch = trained()
    plain = ModelSketch.from_model(model, SIZE, layout)
    normalizer = Normalizer.from_optimizer(model, optimizer)
    sketch = ModelSketch.from_model(model, SIZE, layout, normalizer=normalizer)
    with ExampleSketcher(model, sketch) as sketcher:
        rows = sketcher.sketch(batch).rows
    assert not caplog.messages  # no rule failed, and none was replaced
    for index in range(4):
        model.zero_grad()
        part = slice(index, index + 1)
        model(**{name: x[part] for name, x in batch.items()})["loss"].backward()
        expected = plain.sketch(divided(model, optimizer))
        torch.testing.assert_close(rows[index], expected, rtol=1e-3, atol=1e-4)
        gradients = {name: x.grad for name, x in model.named_parameters()}
        whole = sketch.sketch(gradients)
        torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-4)


def test_experts_are_divided_one_by_one():
    """Their sides are scaled as tokens come, here beside gradients that are formed."""
    model, inputs = tiny_model("mixtral").double(), tiny_inputs("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs).loss.backward()
    optimizer.step()
    normalizer = Normalizer.from_optimizer(model, optimizer)
    sketch = ModelSketch.from_model(model, SIZE, "grouped", normalizer=normalizer)
    kinds = {type(sketch.operators[name]) for name in sketch.operators if "exp" in name}
    assert kinds == {Grouped}
    with ExampleSketcher(model.eval(), sketch) as sketcher:
        rows = sketcher.sketch(inputs).rows
    for index, row in enumerate(rows):
        model.zero_grad()
        alone = {name: x[index : index + 1] for name, x in inputs.items()}
        model(**alone).loss.backward()
        named = model.named_parameters()
        expected = sketch.sketch({n: p.grad for n, p in named if p.grad is not None})
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_the_adjoint_is_the_transpose():
    model, optimizer, _ = trained()
    normalizer = Normalizer.from_optimizer(model, optimizer)
    sketch = ModelSketch.from_model(model, SIZE, normalizer=normalizer)
    torch.manual_seed(1)
    x = {name: torch.randn(p.shape).double() for name, p in model.named_parameters()}
    y = torch.randn(SIZE).double()
    lifted = sketch.adjoint(y)
    product = sum((x[name] * lifted[name]).sum() for name in x)
    torch.testing.assert_close(sketch.sketch(x) @ y, product, rtol=1e-4, atol=1e-4)


def test_it_is_the_same_after_a_trip_through_bytes():
    model, optimizer, _ = trained()
    normalizer = Normalizer.from_optimizer(model, optimizer)
    again = Normalizer.from_bytes(normalizer.to_bytes(), normalizer.step)
    assert again == normalizer
    assert again.step == 3
    sketch = ModelSketch.from_model(model, SIZE, normalizer=normalizer)
    assert ModelSketch.from_dict(sketch.to_dict(), again) == sketch
    other = Normalizer.from_optimizer(*trained(steps=4)[:2])
    with pytest.raises(ValueError, match=r"made with the normalizer .*'step': 3"):
        ModelSketch.from_dict(sketch.to_dict(), other)
    assert ModelSketch.from_model(model, SIZE) != sketch


@pytest.mark.parametrize(
    ("kind", "steps"), [(torch.optim.AdamW, 0), (torch.optim.SGD, 2)]
)
def test_an_optimizer_without_second_moments_is_refused(kind, steps):
    model, optimizer, _ = trained(kind, steps)
    message = rf"second moments of 'words.weight', and {kind.__name__} has none. Train"
    with pytest.raises(ValueError, match=message):
        Normalizer.from_optimizer(model, optimizer)


def test_moments_of_another_model_are_refused():
    normalizer = Normalizer.from_optimizer(*trained()[:2])
    model = Mixed()
    model.head = nn.Linear(10, 6)
    message = r"\[5, 10\] numbers for 'head.weight' of shape \(6, 10\): take it from"
    with pytest.raises(ValueError, match=message):
        ModelSketch.from_model(model, SIZE, normalizer=normalizer)


def test_what_training_has_not_reached_does_not_count():
    model, optimizer, _ = trained()
    optimizer.state[model.head.weight]["exp_avg_sq"].zero_()
    optimizer.state[model.words.weight]["exp_avg_sq"][7] = 0
    normalizer = Normalizer.from_optimizer(model, optimizer)
    sketch = ModelSketch.from_model(model, SIZE, normalizer=normalizer)
    unseen = torch.zeros(40, 12)
    unseen[7] = 1
    row = sketch.sketch({"head.weight": torch.ones(5, 10), "words.weight": unseen})
    assert torch.equal(row, torch.zeros(SIZE))
