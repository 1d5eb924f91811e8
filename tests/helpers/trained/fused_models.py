"""Causal models that return no logits, as fused losses do."""

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

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


class LossOfTokens(FusedLlama):
    """Returns nothing but the mean over tokens, as other fused losses do."""

    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        log_probs = super().forward(*args, labels=labels, **kwargs).log_probs
        items = (labels[:, 1:] != -100).sum()
        if num_items_in_batch is not None:
            items = num_items_in_batch
        return ModelOutput(loss=-log_probs.sum() / items)


class LossOfRows(FusedLlama):
    """Returns the mean of its rows' means, or the sum by what the Trainer passes."""

    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        log_probs = super().forward(*args, labels=labels, **kwargs).log_probs
        means = -log_probs.sum(1) / (labels[:, 1:] != -100).sum(1)
        items = len(means) if num_items_in_batch is None else num_items_in_batch
        return ModelOutput(loss=means.sum() / items)


def fused_llama(temperature=1.0, softcap=None, bias=False, kind=FusedLlama):
    """A model of a class, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        final_logit_softcapping=softcap,
    )
    model = kind(config).double()
    model.temperature = temperature
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(50, dtype=torch.float64))
    with torch.no_grad():  # scores that differ from token to token
        for parameter in model.parameters():
            parameter.mul_(10)
    return model
