"""Rows of models that score tokens with their head's weight, without calling it."""

import logging

import pytest
import torch
from torch.nn import functional
from transformers.utils import ModelOutput

from hf_sketch.examples.modules import fused_head
from hf_sketch.examples.modules.fused_head import FusedHead
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from tests.helpers.folded_sides import launch_everywhere
from tests.helpers.trained.fused_models import IDS, FusedLlama, fused_llama

SIZE = 256


@pytest.mark.parametrize(
    ("temperature", "softcap", "bias", "bonus"),
    [(1.0, None, False, 0.0), (0.7, None, True, 0.3), (1.6, 2.0, False, 0.3)],
)
def test_rows_are_those_of_single_examples(caplog, temperature, softcap, bias, bonus):
    """The loss weighs tokens' log-probabilities and, as a bonus, their entropies."""
    caplog.set_level(logging.INFO, "hf_sketch.examples")
    model = fused_llama(temperature, softcap, bias)
    sketch = ModelSketch.from_model(model, SIZE, layout="factored")
    labels = IDS.clone()
    labels[1, :4] = -100
    factors = torch.rand(3, 11, dtype=torch.float64)

    def loss_of(some):
        output = model(input_ids=IDS[some], labels=labels[some])
        entropy = (factors[some].square() * output.entropy).sum()
        return (factors[some] * output.log_probs).sum() + bonus * entropy

    with ExampleSketcher(model, sketch) as sketcher:
        loss_of(slice(None)).backward()
        batch = sketcher.take()
    assert not caplog.messages  # no rule failed, and none was replaced
    for index in range(3):
        model.zero_grad()
        loss_of(slice(index, index + 1)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        row = batch.weights[index] * batch.rows[index]
        torch.testing.assert_close(row, sketch.sketch(gradients), rtol=1e-6, atol=1e-8)


def test_scores_are_computed_again_in_the_precision_of_the_forward_pass(monkeypatch):
    """Also if the backward pass runs under autocast, as the whole of `sketch` may."""
    logits, plain = [], FusedHead._derivatives

    def noted(head, kind, some, labels):
        logits.append(some)
        return plain(head, kind, some, labels)

    monkeypatch.setattr(FusedHead, "_derivatives", noted)
    model = fused_llama(0.7, None, True).float()
    sketch = ModelSketch.from_model(model, SIZE)
    inputs = {"input_ids": IDS, "labels": IDS}

    def losses(output, inputs):
        return -output.log_probs.sum(1)

    with ExampleSketcher(model, sketch) as sketcher:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        losses(output, inputs).sum().backward()
        expected = sketcher.take()
        with torch.autocast("cpu", torch.bfloat16):
            got = sketcher.sketch(inputs, losses)
        assert all(torch.equal(x, x.bfloat16().float()) for x in logits)
        logits.clear()
        sketcher.sketch(inputs, losses)
        assert not torch.equal(logits[0], logits[0].bfloat16().float())
    rows, wanted = (x.weights.unsqueeze(1) * x.rows for x in (got, expected))
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-5)


def test_kernels_read_the_scores(monkeypatch):
    """In several parts, with a temperature; entropies are left to the plain path."""
    pytest.importorskip("triton")
    model = fused_llama(0.7, None, False).float()
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    inputs = {"input_ids": IDS, "labels": IDS.where(IDS > 4, -100)}
    bonus = torch.rand(3, 11)

    def losses(output, inputs):
        return (bonus * output.entropy - output.log_probs).sum(1)

    with ExampleSketcher(model, sketch) as sketcher:
        expected = sketcher.sketch(inputs, losses)
    launches = launch_everywhere(monkeypatch)
    monkeypatch.setattr(fused_head, "_LOGITS_OF_A_KERNEL", 5 * 3 * 50)
    with ExampleSketcher(model, sketch) as sketcher:
        for _ in range(2):  # the first batch is tried without kernels, too
            launches.clear()
            got = sketcher.sketch(inputs, losses)
    assert launches.count(("turn_softmax", 1)) == 3
    error = got.rows - expected.rows
    assert (error.norm(dim=1) < 1e-5 * expected.rows.norm(dim=1)).all()


def test_memory_that_runs_out_at_a_head_in_shards_ends_training(monkeypatch):
    """Elsewhere the step has no rows; here others would wait for the head's parts."""
    model = fused_llama()
    with ExampleSketcher(model, ModelSketch.from_model(model, SIZE)) as sketcher:
        model(input_ids=IDS, labels=IDS).log_probs.sum().backward()
        sketcher.take()

        def out_of_memory(*_):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(FusedHead, "_add_rows", out_of_memory)
        model(input_ids=IDS, labels=IDS).log_probs.sum().backward()
        with pytest.raises(MemoryError, match="no room"):
            sketcher.take()
        sketcher._reading.fused_head._in_shards = True
        with pytest.raises(RuntimeError, match=r"the head did not fit .*no room.*pass"):
            model(input_ids=IDS, labels=IDS).log_probs.sum().backward()


def ratio(log_probs):
    """The loss of policy gradients with an advantage of 1."""
    return -(log_probs - log_probs.detach()).exp().sum() / (log_probs != 0).sum()


@pytest.mark.parametrize(
    ("rows", "loss_of", "is_mean"),
    [
        (3, lambda x: -x.sum() / (x != 0).sum(), True),
        (1, lambda x: -x.sum() / (x != 0).sum(), True),
        (3, lambda x: -x.sum() / 40, True),  # of the step, in this process
        (3, lambda x: -2 * x.sum() / 40, True),  # in two that share the step
        (3, lambda x: -x.sum() / 39, False),
        # The mean of the rows' means.
        (3, lambda x: -(x.sum(1) / (x != 0).sum(1)).mean(), False),
        (3, lambda x: -(x * x.exp().detach()).sum() / (x != 0).sum(), False),
        (1, lambda x: -0.7 * x.sum() / (x != 0).sum(), False),  # an advantage
        (1, ratio, False),
        (3, ratio, False),
        (3, lambda x: functional.softplus(x.sum(1)).mean(), False),
    ],
)
def test_own_losses_are_known_where_the_loss_is_a_mean_over_tokens(
    rows, loss_of, is_mean
):
    """Elsewhere rows are shares, whatever the first batch's coefficients are."""
    model = fused_llama()
    sketch = ModelSketch.from_model(model, SIZE)
    labels = IDS[:rows].clone()
    labels[0, :4] = -100
    with ExampleSketcher(model, sketch) as sketcher:
        for _ in range(2):  # what the first batch has shown holds for the second
            output = model(input_ids=IDS[:rows], labels=labels)
            loss = loss_of(output.log_probs)
            sketcher.note_loss(loss, torch.tensor(40))
            loss.backward()
            batch = sketcher.take()
    assert bool(batch.losses.isnan().any()) != is_mean
    model.zero_grad()
    loss_of(model(input_ids=IDS[:rows], labels=labels).log_probs).backward()
    whole = sketch.sketch({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(batch.weights @ batch.rows, whole)
    if not is_mean:
        return
    for index in range(rows):
        model.zero_grad()
        some = slice(index, index + 1)
        log_probs = model(input_ids=IDS[some], labels=labels[some]).log_probs
        own = -log_probs.sum() / (labels[some, 1:] != -100).sum()
        own.backward()
        row = sketch.sketch({name: p.grad for name, p in model.named_parameters()})
        # The model computes parts in float32.
        assert (batch.rows[index] - row).norm() < 2e-6 * row.norm()
        assert float(batch.losses[index]) == pytest.approx(float(own.detach()))


class Sink(torch.autograd.Function):
    """What DDP passes all outputs through; what nobody uses has the gradient None."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class FusedLlamaWithLoss(FusedLlama):
    """Returns a loss, too, which nobody need use."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return ModelOutput(loss=-output.log_probs.mean(), **output)


def test_outputs_without_a_gradient_are_left_out():
    model = fused_llama(kind=FusedLlamaWithLoss)
    sketch = ModelSketch.from_model(model, SIZE)
    with ExampleSketcher(model, sketch) as sketcher:
        output = model(input_ids=IDS, labels=IDS)
        fields = (output.log_probs, output.entropy, output.loss)
        log_probs, *unused = Sink.apply(*fields)
        assert all(field.requires_grad for field in unused)
        loss = -log_probs.mean()
        sketcher.note_loss(loss)
        loss.backward()
        batch = sketcher.take()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(batch.weights @ batch.rows, sketch.sketch(gradients))


def test_later_batches_may_weigh_examples_otherwise():
    """Their rows are those of the own losses all the same."""
    model = fused_llama()
    sketch = ModelSketch.from_model(model, SIZE)
    factors = torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64)
    with ExampleSketcher(model, sketch) as sketcher:
        for each in (torch.full((3,), 1 / 33, dtype=torch.float64), factors):
            log_probs = model(input_ids=IDS, labels=IDS).log_probs
            loss = -(each @ log_probs.sum(1))
            sketcher.note_loss(loss)
            loss.backward()
            batch = sketcher.take()
    torch.testing.assert_close(batch.weights, 11 * factors)
    for index in (0, 2):
        model.zero_grad()
        some = slice(index, index + 1)
        (-model(input_ids=IDS[some], labels=IDS[some]).log_probs.mean()).backward()
        row = sketch.sketch({name: p.grad for name, p in model.named_parameters()})
        assert (batch.rows[index] - row).norm() < 2e-6 * row.norm()
