"""Rows of models that score tokens with their head's weight, without calling it."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch

SIZE = 256
IDS = torch.arange(36).view(3, 12).mul(7).remainder(50)


class FusedLlama(LlamaForCausalLM):
    """Returns log-probabilities of its labels and no logits, as fused losses do."""

    temperature, bias = 1.0, False

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids, attention_mask).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        scores = functional.linear(hidden, self.lm_head.weight, self.lm_head.bias)
        cap = getattr(self.config, "final_logit_softcapping", None)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        log_probs = (scores / self.temperature).log_softmax(-1)
        own = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        masked = labels == -100
        return ModelOutput(
            log_probs=own.masked_fill(masked, 0), entropy=entropy.masked_fill(masked, 0)
        )


def fused_llama(temperature, softcap, bias):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        final_logit_softcapping=softcap,
    )
    model = FusedLlama(config).double()
    model.temperature = temperature
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(50, dtype=torch.float64))
    with torch.no_grad():  # scores that differ from token to token
        for parameter in model.parameters():
            parameter.mul_(10)
    return model


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


def test_scores_are_computed_again_in_full_precision_under_autocast():
    """Also if the backward pass runs there, as the whole of `sketch` may."""
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
    rows, wanted = (x.weights.unsqueeze(1) * x.rows for x in (got, expected))
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-5)
