"""Rows of a backward pass that goes through several calls of a model."""

import pytest
import torch
from torch import nn

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.comparison import check_comparison
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import (
    EXAMPLES,
    FEW,
    DoublePrecision,
    tiny_inputs,
    tiny_model,
)

SIZE = 128


def part(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


def alone(model, sketch, inputs, index):
    """The sketch of the gradient of an example's own loss, and the loss."""
    loss = model(**part(inputs, slice(index, index + 1))).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    named = zip(names, gradients, strict=True)
    return sketch.sketch({n: g for n, g in named if g is not None}), loss.detach()


@pytest.mark.parametrize(
    "name",
    [
        "t5",
        "gemma3_text",
        *full(*(name for name in FEW if name not in ("t5", "gemma3_text"))),
    ],
)
def test_rows_of_two_calls_follow_one_another(name):
    """The calls are of different sizes, and one comes between without gradients."""
    model = tiny_model(name)
    sketch = ModelSketch.from_model(model, SIZE)
    first, second = tiny_inputs(name, 1), part(tiny_inputs(name, 2), slice(1, 3))
    with DoublePrecision():
        with ExampleSketcher(model, sketch) as sketcher:
            loss = 2 * model(**first).loss
            with torch.no_grad():
                model(**part(first, slice(0, 3)))
            (loss + 3 * model(**second).loss).backward()
            got = sketcher.take()
        expected = [alone(model, sketch, first, index) for index in range(EXAMPLES)]
        expected += [alone(model, sketch, second, index) for index in range(2)]
        total = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    assert [call.split.size for call in got.calls] == [EXAMPLES, 2]
    rows, losses = (torch.stack(x) for x in zip(*expected, strict=True))
    torch.testing.assert_close(got.rows, rows.to(got.rows))
    torch.testing.assert_close(got.losses, losses.to(got.losses))
    torch.testing.assert_close(
        (got.weights.to(got.rows) @ got.rows), total.to(got.rows)
    )
    assert float(got.weights[:EXAMPLES].sum()) == pytest.approx(2.0)
    assert float(got.weights[EXAMPLES:].sum()) == pytest.approx(3.0)


def test_hooks_of_outputs_do_not_run_while_a_loss_is_checked():
    """DeepSpeed's would begin its own backward pass."""
    model, ran = tiny_model("bert"), []
    sketch = ModelSketch.from_model(model, SIZE)
    inputs = tiny_inputs("bert")
    owners = range(EXAMPLES)
    with ExampleSketcher(model, sketch) as sketcher:
        sketcher.keeps_answers = True
        output = model(**inputs)
        for x in (output.loss, output.logits):
            x.register_hook(ran.append)
        calls, logits = sketcher.backward_pass.calls, output.logits
        check_comparison(2 * output.loss, calls, owners, "a sum")
        with pytest.raises(ValueError, match="a contrast compares"):
            check_comparison(logits.logsumexp(0).sum(), calls, owners, "a contrast")
        assert not ran
        output.loss.backward()
    assert len(ran) == 2


def test_a_call_that_the_loss_does_not_come_of_has_no_rows():
    model = tiny_model("gpt2")
    inputs = tiny_inputs("gpt2")
    with ExampleSketcher(model, ModelSketch.from_model(model, SIZE)) as sketcher:
        model(**inputs)
        model(**inputs).loss.backward()
        got = sketcher.take()
        expected = sketcher.sketch(inputs)
    torch.testing.assert_close(got.rows, expected.rows)
    torch.testing.assert_close(got.weights, expected.weights)


class Norm(nn.Module):
    """Gemma's: scales by one more than its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.4, 4))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


class Towers(nn.Module):
    """Each input has layers of its own."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 4), Norm())
        self.right = nn.Sequential(nn.Linear(2, 4), Norm())

    def forward(self, left=None, right=None):
        return self.left(left) if right is None else self.right(right)


def test_calls_may_use_different_modules():
    """The second call is learned while the first awaits its backward pass."""
    torch.manual_seed(0)
    model = Towers()
    sketch = ModelSketch.from_model(model, 16)
    left, right = torch.randn(5, 3), torch.randn(5, 2)
    with ExampleSketcher(model, sketch) as sketcher:
        (model(left=left) * model(right=right)).sum().backward()
        got = sketcher.take()
    shares = (got.weights.unsqueeze(1) * got.rows).view(2, 5, -1).sum(0)
    for index, share in enumerate(shares):
        model.zero_grad()
        own = slice(index, index + 1)
        (model(left=left[own]) * model(right=right[own])).sum().backward()
        expected = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(share, expected)
