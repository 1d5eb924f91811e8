"""Models that return a loss and log-probabilities, and hooks on both."""

import pytest
import torch
from transformers.utils import ModelOutput

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from tests.helpers.trained.fused_models import IDS, FusedLlama, fused_llama

SIZE = 256


class Apart(FusedLlama):
    """Returns a loss that does not come of its log-probabilities, as in DeepSpeed."""

    def forward(self, *args, labels=None, **kwargs):
        log_probs = super().forward(*args, labels=labels, **kwargs).log_probs
        loss = -log_probs.sum() / (labels[:, 1:] != -100).sum()
        return ModelOutput(loss=loss, log_probs=log_probs.view_as(log_probs))


class DetachedInEvaluation(FusedLlama):
    """Returns a loss that trains in training only."""

    def forward(self, *args, labels=None, **kwargs):
        log_probs = super().forward(*args, labels=labels, **kwargs).log_probs
        loss = -log_probs.mean()
        loss = loss if self.training else loss.detach()
        return ModelOutput(loss=loss, log_probs=log_probs)


@pytest.mark.parametrize(
    ("kind", "used"),
    [(Apart, "loss"), (Apart, "log_probs"), (DetachedInEvaluation, "loss")],
)
def test_a_loss_beside_log_probabilities_has_the_heads_gradients(kind, used):
    """Whichever of the two is trained on, and with nothing twice."""
    model = fused_llama(kind=kind).train()
    sketch = ModelSketch.from_model(model, SIZE)
    with ExampleSketcher(model, sketch) as sketcher:
        output = model(input_ids=IDS, labels=IDS)
        (output.loss if used == "loss" else -output.log_probs.mean()).backward()
        batch = sketcher.take()
    total = (batch.weights.unsqueeze(1) * batch.rows).sum(0)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(total, sketch.sketch(gradients), rtol=1e-6, atol=1e-8)


class WithLoss(FusedLlama):
    """Returns the mean over tokens beside their log-probabilities."""

    def forward(self, *args, labels=None, **kwargs):
        log_probs = super().forward(*args, labels=labels, **kwargs).log_probs
        return ModelOutput(loss=-log_probs.mean(), log_probs=log_probs)


@pytest.mark.parametrize("used", ["loss", "log_probs"])
def test_hooks_of_outputs_run_in_the_backward_pass_alone(used):
    """DeepSpeed's divide gradients elsewhere, and begin its own backward pass."""
    model, is_training, ran = fused_llama(kind=WithLoss), False, []

    def halve_elsewhere(gradient):
        ran.append(is_training)
        return gradient if is_training else gradient / 2

    with ExampleSketcher(model, ModelSketch.from_model(model, SIZE)) as sketcher:
        output = model(input_ids=IDS, labels=IDS)
        for name in ("loss", "log_probs"):
            output[name].register_hook(halve_elsewhere)
        loss = output.loss if used == "loss" else -output.log_probs.mean()
        sketcher.note_loss(loss, None)
        assert not ran
        is_training = True
        loss.backward()
        batch = sketcher.take()
    assert ran == [True] * (1 + (used == "loss"))
    torch.testing.assert_close(batch.losses, -output.log_probs.mean(1))


@pytest.mark.parametrize("kind", [Apart, WithLoss])
def test_the_head_has_the_gradient_that_hooks_of_the_loss_leave(kind):
    """DeepSpeed's divide it, if micro-batches are accumulated."""
    model = fused_llama(kind=kind)
    sketch = ModelSketch.from_model(model, SIZE)
    with ExampleSketcher(model, sketch) as sketcher:
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.register_hook(lambda gradient: gradient / 2)
        loss.backward()
        batch = sketcher.take()
    total = (batch.weights.unsqueeze(1) * batch.rows).sum(0)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(total, sketch.sketch(gradients), rtol=1e-6, atol=1e-8)
