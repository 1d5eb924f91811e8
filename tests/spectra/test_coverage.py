"""Error bars of eigenvalues against dense Hessians, over many seeds."""

import math
from functools import cache

import pytest
import torch

from hf_sketch.recipes.tables.models.dense_hessian import DenseHessian, tiny_model
from hf_sketch.recipes.tables.quality.coverage import (
    CoverageArguments,
    exact_eigenvalues,
    run_coverage,
    scores,
    spectra_of,
)
from tests.helpers.tiers import full

SEEDS = 40
RARE = 1e-3


@cache
def small():
    """A model's Hessian and the batch that it is taken over."""
    model, batch = tiny_model("gpt2", width=8, steps=20)
    return DenseHessian(model, [batch]), batch


def binomial(count, probability):
    """The numbers of successes in `count` trials that are not rare, on either side."""
    chances = [
        math.comb(count, k) * probability**k * (1 - probability) ** (count - k)
        for k in range(count + 1)
    ]
    below = torch.tensor(chances, dtype=torch.float64).cumsum(0)
    likely = [k for k in range(count + 1) if below[k] > RARE / 2]
    return range(
        likely[0], max(k for k in likely if k and below[k - 1] < 1 - RARE / 2) + 1
    )


@pytest.mark.parametrize("operator", ["srht", "afjl", "qk", *full("affd")])
def test_error_bars_cover_what_they_say(operator):
    """Of the largest eigenvalue: 68% of the seeds within one error, 95% within two.

    The seeds are independent, so that both numbers are binomial.
    """
    hessian, _ = small()
    arguments = CoverageArguments(out_size=128, seeds=SEEDS, krylov_dim=40)
    truth = exact_eigenvalues(hessian, 1)
    spectra = spectra_of(hessian, operator, arguments)
    found = torch.cat([scores(spectrum, truth) for spectrum in spectra])
    assert int((found.abs() < 1).sum()) in binomial(SEEDS, 0.6827)
    assert int((found.abs() < 2).sum()) in binomial(SEEDS, 0.9545)


def test_the_exact_matrix_is_the_hessian():
    hessian, batch = small()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(hessian.size, generator=generator, dtype=torch.float64)
    parameters = list(hessian.parameters.values())
    loss = hessian.mean_loss.model(**batch).loss
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    along = torch.cat([part.flatten() for part in gradient]) @ vector
    wanted = torch.cat([p.flatten() for p in torch.autograd.grad(along, parameters)])
    torch.testing.assert_close(hessian @ vector, wanted, rtol=1e-6, atol=1e-8)


def test_the_coverage_table_runs_and_saves(tmp_path, capsys):
    results = run_coverage(CoverageArguments(str(tmp_path), "bert", "srht", tiny=True))
    cell = results["bert"]["srht"]
    assert 0 <= cell["within"][0] <= cell["within"][1] <= 1
    assert (tmp_path / "coverage.json").is_file()
    assert "srht  within 1: " in capsys.readouterr().out
