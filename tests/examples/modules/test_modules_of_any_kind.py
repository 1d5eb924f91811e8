"""Modules that have no rule are run again for each example, or named."""

import pytest
import torch
from torch import nn

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.own_gradients import assert_rows_match
from tests.helpers.tiers import full
from tests.helpers.trained.training import tiny_batch, tiny_bert


class Doubled(nn.Linear):
    """A Linear whose forward pass is not that of Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


class Noisy(nn.Linear):
    """A module of its own kind that draws random numbers."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Holder(nn.Module):
    """Uses a bare parameter, one in a list, and a Linear that it does not call."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(32))
        self.scales = nn.ParameterList([torch.randn(32)])
        self.inner = nn.Linear(32, 3)

    def forward(self, x):
        x = x * self.scales[0] + self.shift
        return x @ self.inner.weight.T + self.inner.bias


@pytest.mark.parametrize("layout", ["grouped", "blocked", "flat", *full("factored")])
@pytest.mark.parametrize("head", [Doubled(32, 3), Holder()], ids=["own", "bare"])
def test_modules_of_any_kind_are_run_again(head, layout):
    model = tiny_bert()
    model.classifier = head
    assert_rows_match(model.double().eval(), tiny_batch(), layout, 1e-9)


def test_random_numbers_are_those_of_the_pass_that_trained():
    model = tiny_bert()
    model.classifier = Noisy(32, 3)
    model = model.double().train()
    sketch = ModelSketch.from_model(model, 256)
    with ExampleSketcher(model, sketch) as sketcher:
        model(**tiny_batch()).loss.backward()
        state = torch.get_rng_state()
        got = sketcher.take()
    assert torch.equal(state, torch.get_rng_state())
    whole = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(got.weights @ got.rows, whole, rtol=1e-9, atol=1e-12)


def test_a_model_that_cannot_be_repeated_is_named():
    class Counter(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * super().forward(x)

    model = tiny_bert()
    model.classifier = Counter(32, 3)
    with (
        ExampleSketcher(model, ModelSketch.from_model(model, 256)) as sketcher,
        pytest.raises(RuntimeError, match=r"BertForSequence.* must give the same out"),
    ):
        sketcher.sketch(tiny_batch())


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims, groups, padding):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    sizes = (3, 2, 4)[:dims]  # "same" pads even ones more behind than before
    settings = {"padding": padding, "dilation": 2, "groups": groups}
    settings["stride"] = 1 if padding == "same" else 2
    torch.manual_seed(0)
    model = Pixels(kind(4, 6, sizes, **settings), 6).double()
    batch = {
        "pixel_values": torch.randn(5, 4, *[9, 8, 7][:dims], dtype=torch.float64),
        "labels": torch.tensor([0, 1, 2, 3, 0]),
    }
    assert_rows_match(model, batch, "blocked", 1e-9)


class Pixels(nn.Module):
    """A classifier of one convolution."""

    main_input_name = "pixel_values"

    def __init__(self, convolution, classes):
        super().__init__()
        self.convolution = convolution

    def forward(self, pixel_values, labels):
        logits = self.convolution(pixel_values).square().flatten(2).mean(2)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_an_embedding_that_depends_on_batch_mates_is_named():
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.scale_grad_by_freq = True
    with pytest.raises(ValueError, match="scale_grad_by_freq=True"):
        ExampleSketcher(model, ModelSketch.from_model(model, 256))
