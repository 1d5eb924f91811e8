"""The learning rate up to which SGD is stable, beside SGD on a quadratic function."""

import math

import pytest
import torch

from tests.helpers.spectra import VALUES, WIDE, Quadratic, made_of


def loss_after(model, rate, momentum, steps=400):
    """The loss after steps of SGD with heavy-ball momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.zeros(1))["loss"]
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_converges_below_the_rate_and_diverges_above(momentum):
    positive = [value for value in VALUES if value > 0]
    spectrum = made_of(model_sketch=WIDE, residuals=torch.zeros(len(VALUES)).double())
    rate = spectrum.stable_learning_rate(momentum)
    first = loss_after(Quadratic(positive, torch.float64), 0.0, 0.0, 1)
    below, above = (
        loss_after(Quadratic(positive, torch.float64), factor * rate, momentum)
        for factor in (0.97, 1.03)
    )
    assert below < 1e-3 * first
    assert above > 1e3 * first


def test_without_a_positive_eigenvalue_every_rate_is_stable():
    spectrum = made_of(values=(-3.0, -1.0), weights=(0.0, 1.0), kept=(0,))
    assert spectrum.stable_learning_rate() == math.inf


def test_a_momentum_of_one_is_refused():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        made_of().stable_learning_rate(1.0)
