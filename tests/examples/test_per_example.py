import contextlib
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.calls import field_of
from hf_sketch.examples.rules import linear
from hf_sketch.examples.rules.base import is_kept
from tests.helpers.tiers import full
from tests.helpers.trained.training import tiny_batch, tiny_bert

every_layout = pytest.mark.parametrize(
    "layout", ["grouped", "blocked", "flat", *full("factored")]
)


@pytest.fixture(params=["grouped", *full("factored", "blocked", "flat")])
def layout(request):
    return request.param


def oracle(model, batch, sketch, index):
    """The sketch of one example's gradient, from a backward pass of its own."""
    model.zero_grad()
    alone = {name: column[index : index + 1] for name, column in batch.items()}
    loss = field_of(model(**alone), "loss", 0)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sketch.sketch(gradients), float(loss.detach())


def assert_rows_match(model, batch, layout, tolerance):
    size = min(256, sum(p.numel() for p in model.parameters()))
    sketch = ModelSketch.from_model(model, size, layout)
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(batch)
    for index in range(len(batch["labels"])):
        row, loss = oracle(model, batch, sketch, index)
        assert (got.rows[index] - row).norm() < tolerance * row.norm()
        assert abs(float(got.losses[index]) - loss) < tolerance
    return got


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
        expected, _ = oracle(model, batch, sketch, index)
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


def test_the_backward_pass_is_bit_equal_with_and_without():
    gradients = []
    for watched in (False, True):
        model = tiny_bert().train()
        sketcher = ExampleSketcher(model, ModelSketch.from_model(model, 256))
        torch.manual_seed(5)
        if watched:
            with sketcher:
                model(**tiny_batch()).loss.backward()
        else:
            model(**tiny_batch()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sketching_holds_nothing_of_the_batch_afterwards():
    model, made = tiny_bert().eval(), []
    linear = model.classifier
    linear.register_forward_hook(lambda *call: made.append(weakref.ref(call[2])))
    gc.collect()
    gc.disable()
    try:
        with ExampleSketcher(model, ModelSketch.from_model(model, 64)) as sketcher:
            sketcher.sketch(tiny_batch())
            assert made
            assert all(output() is None for output in made)
    finally:
        gc.enable()


def test_sketching_leaves_gradients_and_hooks_as_they_were():
    model = tiny_bert().eval()
    with ExampleSketcher(model, ModelSketch.from_model(model, 256)) as sketcher:
        sketcher.sketch(tiny_batch())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


@every_layout
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
        sketcher_for(model) as sketcher,
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


def sketcher_for(model):
    return ExampleSketcher(model, ModelSketch.from_model(model, 256))


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
        expected, _ = oracle(model, tiny_batch(), sketch, index)
        assert (row - expected).norm() < 1e-9 * expected.norm()


def test_taking_without_a_backward_pass_is_named():
    model = tiny_bert()
    with sketcher_for(model) as sketcher:
        model(**tiny_batch())
        with pytest.raises(RuntimeError, match="a forward and a backward pass"):
            sketcher.take()
    with pytest.raises(RuntimeError, match="inside `with ExampleSketcher"):
        sketcher.sketch(tiny_batch())


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
