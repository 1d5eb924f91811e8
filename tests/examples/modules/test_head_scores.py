"""Scores that a head makes of logits."""

import pytest
import torch

from hf_sketch.examples.modules.head_scores import HeadScores


def test_a_temperature_may_be_fitted_again():
    """As in shards, until all processes have labels in one call."""
    torch.manual_seed(0)
    logits = torch.randn(20, 50, dtype=torch.float64)
    labels, scores = torch.arange(20), HeadScores(1.0, None)
    for temperature in (0.7, 1.6):
        log_probs = (logits / temperature).log_softmax(-1)[labels, labels]
        scores = scores.fitted(logits, labels, log_probs)
        assert scores.temperature == pytest.approx(temperature, rel=1e-6)
