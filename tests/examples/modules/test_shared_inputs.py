"""Layers that take one input have it folded together; rows stay what they were."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sketch import ExampleSketcher, ModelSketch, Normalizer
from tests.helpers.folded_sides import launch_everywhere

pytest.importorskip("triton")

HALF = {"device_type": "cpu", "dtype": torch.bfloat16}


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=60)
    return LlamaForCausalLM(config)


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(60, (3, 7), generator=generator)
    return {"input_ids": ids, "labels": ids}


def rows_of(model, batches, autocast=False, before=lambda: None, normalizer=None):
    """The rows of each batch."""
    sketch = ModelSketch.from_model(model, 256, "grouped", normalizer=normalizer)
    found = []
    with ExampleSketcher(model, sketch) as sketcher:
        for batch in batches:
            with torch.autocast(**HALF) if autocast else nullcontext():
                loss = model(**batch)
            before()
            (loss.loss if hasattr(loss, "loss") else loss["loss"]).backward()
            found.append(sketcher.take().rows)
    return found


def assert_near(got, expected):
    for some, wanted in zip(got, expected, strict=True):
        precision = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(some, wanted, rtol=0, atol=precision)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_rows_are_those_of_the_plain_path(autocast, monkeypatch):
    batches = [batch_of(seed) for seed in (1, 2)]
    expected = rows_of(llama(), batches, autocast)
    launches = launch_everywhere(monkeypatch)
    assert_near(rows_of(llama(), batches, autocast), expected)
    counts = {sides for _, sides in launches}
    assert {2, 3} <= counts


class Taking(nn.Module):
    """Two layers that may take one input, and a loss that adds the examples' up."""

    main_input_name = "x"

    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40)
        self.change = change

    def forward(self, x):
        hidden = torch.tanh(x)
        first = self.first(hidden)
        if self.change is not None:
            hidden = self.change(hidden)
        logits = first * self.second(hidden)
        return {"loss": logits.square().mean(), "logits": logits}


def doubled_in_place(x):
    return x.detach().mul_(2)


def numbers_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(3, 5, 24, generator=generator)}


@pytest.mark.parametrize(
    ("change", "autocast", "together"),
    [
        (None, False, 2),
        (None, True, 2),
        (torch.clone, False, 1),
        (torch.clone, True, 1),
        (doubled_in_place, True, 1),
    ],
    ids=["one", "one, autocast", "equal", "equal, autocast", "changed"],
)
def test_inputs_are_folded_together_if_they_are_one(
    change, autocast, together, monkeypatch
):
    """Also where the first batch must show it, since nothing keeps the input."""
    batches = [numbers_of(seed) for seed in (1, 2)]
    expected = rows_of(Taking(change), batches, autocast)
    launches = launch_everywhere(monkeypatch)
    got = rows_of(Taking(change), batches, autocast)
    assert_near(got, expected)
    assert max(sides for _, sides in launches) == together


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_scaled_inputs_are_folded_together_too(autocast, monkeypatch):
    batches = [numbers_of(seed) for seed in (1, 2)]
    moments = {
        name: tuple(0.1 + torch.rand(size) for size in parameter.shape)
        for name, parameter in Taking().named_parameters()
    }
    normalizer = Normalizer(moments, 1)
    expected = rows_of(Taking(), batches, autocast, normalizer=normalizer)
    launches = launch_everywhere(monkeypatch)
    got = rows_of(Taking(), batches, autocast, normalizer=normalizer)
    assert_near(got, expected)
    assert ("turn_sides", 2) in launches


def test_an_input_that_others_followed_may_come_alone(monkeypatch):
    batches = [numbers_of(seed) for seed in (1, 2, 3)]
    changes = [None, torch.clone, None]

    def rows(model):
        following = iter(changes[1:])

        def change():
            model.change = next(following, None)

        return rows_of(model, batches, autocast=True, before=change)

    expected = rows(Taking())
    launch_everywhere(monkeypatch)
    assert_near(rows(Taking()), expected)
