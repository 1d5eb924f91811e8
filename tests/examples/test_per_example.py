"""Rows of a batch's examples, beside a backward pass of each."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.rules import linear
from hf_sketch.examples.rules.base import is_kept
from tests.helpers.own_gradients import assert_rows_match, own_row
from tests.helpers.tiers import full
from tests.helpers.trained.training import tiny_batch, tiny_bert

every_layout = pytest.mark.parametrize(
    "layout", ["grouped", "blocked", "flat", *full("factored")]
)


@pytest.fixture(params=["grouped", *full("factored", "blocked", "flat")])
def layout(request):
    return request.param


@every_layout
def test_rows_are_those_of_single_example_passes_in_float64(layout):
    assert_rows_match(tiny_bert().double().eval(), tiny_batch(), layout, 1e-9)


@every_layout
def test_rows_are_right_where_weights_have_operators_of_their_own(layout):
    model = tiny_bert(vocab_size=2100, intermediate_size=2100).double().eval()
    sketch = ModelSketch.from_model(model, 256, layout)
    assert layout == "flat" or len(sketch.operators) > 4
    assert_rows_match(model, tiny_batch(), layout, 1e-9)


def test_rows_are_those_of_single_example_passes_in_float32(layout):
    assert_rows_match(tiny_bert().eval(), tiny_batch(), layout, 1e-4)


def test_padding_that_is_attended_to_gets_no_embedding_gradient(layout):
    batch = tiny_batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert (batch["input_ids"] == 0).any()
    assert_rows_match(tiny_bert().double().eval(), batch, layout, 1e-9)


def test_gradients_of_padding_that_are_not_finite_are_left_out():
    """The length of a padding row, which is zero, has no derivative."""

    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4, padding_idx=0)

        def forward(self, input_ids, labels):
            lengths = self.words(input_ids).square().sum(-1).sqrt()
            loss = (lengths.sum(1) - labels).square().mean()
            return {"loss": loss, "logits": lengths}

    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 0], [5, 0, 0]])
    batch = {"input_ids": ids, "labels": torch.tensor([1.0, 2.0]).double()}
    model = Lengths().double()
    sketch = ModelSketch.from_model(model, 16)
    with ExampleSketcher(model, sketch) as sketcher:
        rows = sketcher.sketch(batch).rows
    for index, row in enumerate(rows):
        expected, _ = own_row(model, batch, sketch, index)
        torch.testing.assert_close(row, expected)
        assert expected.isfinite().all()


def test_rows_do_not_depend_on_batch_mates(layout):
    model = tiny_bert().double().eval()
    sketch = ModelSketch.from_model(model, 256, layout)
    batch = tiny_batch(6)
    with ExampleSketcher(model, sketch) as sketcher:
        whole = sketcher.sketch(batch).rows
        part = sketcher.sketch({n: c[[4, 1]] for n, c in batch.items()}).rows
    torch.testing.assert_close(part, whole[[4, 1]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_classification_losses(kind, layout):
    model = tiny_bert(problem_type=kind).double().eval()
    batch = tiny_batch()
    batch["labels"] = torch.rand(5, 3, dtype=torch.float64)
    assert_rows_match(model, batch, layout, 1e-9)


def test_regression_with_one_output(layout):
    model = tiny_bert(num_labels=1).double().eval()
    batch = tiny_batch()
    batch["labels"] = torch.rand(5, dtype=torch.float64)
    # A batch of one is squeezed to a scalar by the model, which is the same loss.
    assert_rows_match(model, batch, layout, 1e-9)


@pytest.mark.parametrize("examples", [1, 5])
@pytest.mark.parametrize("shape", [(-1, 1), (-1,)], ids=["column", "vector"])
def test_one_score_per_example_with_labels_of_zero_and_one(shape, examples):
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x, labels):
            scores = self.linear(x).view(shape)
            loss = functional.binary_cross_entropy_with_logits(
                scores.flatten(), labels.to(scores.dtype)
            )
            return {"loss": loss, "logits": scores}

    torch.manual_seed(0)
    batch = {"x": torch.randn(examples, 4).double(), "labels": torch.arange(examples)}
    batch["labels"] %= 2
    model = Scored().double()
    sketch = ModelSketch.from_model(model, 4)
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(batch)
    for index in range(examples):
        row, loss = own_row(model, batch, sketch, index)
        torch.testing.assert_close(got.rows[index], row, rtol=1e-9, atol=1e-12)
        assert float(got.losses[index]) == pytest.approx(loss, rel=1e-9)


def test_examples_without_a_label_weigh_nothing():
    model = tiny_bert().double().eval()
    batch = tiny_batch()
    batch["labels"][2] = -100
    sketch = ModelSketch.from_model(model, 256)
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(batch)
    assert got.weights.tolist() == [0.25, 0.25, 0.0, 0.25, 0.25]
    assert not got.rows[2].any()
    assert got.losses[2] == 0


def test_the_weighted_sum_is_the_batch_gradient_with_dropout_and_scaling(layout):
    model = tiny_bert().double().train()
    sketch = ModelSketch.from_model(model, 256, layout)
    with ExampleSketcher(model, sketch) as sketcher:
        loss = model(**tiny_batch()).loss
        (loss * 7.0).backward()
        got = sketcher.take()
    whole = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(got.weights @ got.rows, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.weights, torch.full((5,), 7 / 5).double())


def test_a_loss_of_its_own_kind_is_split(layout):
    model = tiny_bert().double().eval()
    plain = model.forward

    def doubled(**inputs):
        output = plain(**inputs)
        output["loss"] = 2 * output["loss"]
        return output

    model.forward = doubled
    sketch = ModelSketch.from_model(model, 256, layout)
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(tiny_batch())
    assert got.losses.isnan().all()
    torch.testing.assert_close(got.weights, torch.full((5,), 1 / 5).double())
    for index, row in enumerate(got.rows):
        expected, _ = own_row(model, tiny_batch(), sketch, index)
        assert (row - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("how", ["plain", "recomputed", "offloaded", "autocast"])
def test_inputs_that_autograd_does_not_keep_are_folded_at_once(how, monkeypatch):
    model, batch, kept = tiny_bert().eval(), tiny_batch(), set()
    sketch = ModelSketch.from_model(model, 64, "grouped")

    def note(*args):
        kept.add(is_kept(*args))
        return is_kept(*args)

    monkeypatch.setattr(linear, "is_kept", note)
    with ExampleSketcher(model, sketch) as sketcher:
        expected = sketcher.sketch(batch).rows
    assert kept == {True}
    kept.clear()
    around, tolerance = contextlib.nullcontext(), 1e-5
    if how == "recomputed":
        layer = model.bert.encoder.layer[0]
        again = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        monkeypatch.setattr(layer, "forward", again)
    elif how == "offloaded":
        around = torch.autograd.graph.save_on_cpu()
    elif how == "autocast":
        around, tolerance = torch.autocast("cpu", dtype=torch.bfloat16), 5e-2
    with ExampleSketcher(model, sketch) as sketcher:
        with around:
            loss = model(**batch).loss
        loss.backward()
        got = sketcher.take().rows
    assert (got - expected).norm() < tolerance * expected.norm()
    assert (False in kept) == (how != "plain")
