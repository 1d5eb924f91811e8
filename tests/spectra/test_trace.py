"""The sum of an operator's eigenvalues, estimated by Hutch++."""

import math

import pytest
import torch

from hf_sketch import CounterRandom, estimate_trace
from tests.helpers.operators.symmetric import Diagonal, Matrix, goe, with_eigenvalues

SIZE = 300


def trace(operator, products, seed=0):
    return estimate_trace(operator, products=products, seed=seed, progress=False)


@pytest.mark.parametrize("rank", [0, 1, 5, 10])
def test_a_trace_of_low_rank_is_exact(rank):
    eigenvalues = torch.zeros(SIZE)
    eigenvalues[:rank] = torch.linspace(-3, 8, rank)
    matrix, _ = with_eigenvalues(eigenvalues)
    result = trace(Matrix(matrix), 30)
    assert abs(result.value - matrix.trace()) < 1e-10
    assert result.standard_error < 1e-10
    beyond = trace(Matrix(with_eigenvalues(torch.linspace(-3, 8, SIZE))[0]), 30)
    assert beyond.standard_error > 1


DECAYING = torch.linspace(1, 100, SIZE).double() ** -1.0


def test_the_trace_is_unbiased_with_the_error_that_it_says():
    draws, products = 120, 24
    matrix, _ = with_eigenvalues(DECAYING)
    results = [trace(Matrix(matrix), products, seed) for seed in range(draws)]
    errors = torch.tensor([result.value for result in results]) - DECAYING.sum()
    variance = torch.tensor([result.standard_error**2 for result in results]).mean()
    assert abs(errors.mean()) < 5 * math.sqrt(variance / draws)
    # The variance of 120 near normal values is off by sqrt(2 / 120) of itself.
    assert abs(errors.var() / variance - 1) < 5 * math.sqrt(2 / draws)
    # Hutchinson's variance, 2 |F|^2 by the number of probes, of what is left of the
    # matrix: what the best range of 8 leaves, and some times that for a sketched one.
    best = 2 * DECAYING.sort().values[:-8].square().sum() / (products - 2 * 8)
    assert 0.5 * best < variance < 4 * best


def test_the_trace_has_a_tenth_of_plain_hutchinsons_variance():
    eigenvalues = torch.full((SIZE,), 0.1).double()
    eigenvalues[:10] = torch.linspace(20, 100, 10)
    matrix, _ = with_eigenvalues(eigenvalues)
    draws, products = 50, 45
    ours = [trace(Matrix(matrix), products, seed).value for seed in range(draws)]
    errors = torch.tensor(ours).double() - eigenvalues.sum()
    off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
    plain = 2 * off_diagonal / products
    assert abs(errors.mean()) < 5 * math.sqrt(plain / 10 / draws)
    assert errors.var() < plain / 10


def test_the_trace_of_a_diagonal_matrix_needs_no_luck_with_signs():
    elements = CounterRandom(0, "diagonal").normals(0, SIZE).double()
    result = trace(Diagonal(elements), 30)
    assert abs(result.value - elements.sum()) < 5 * result.standard_error


def test_the_trace_works_in_float32():
    eigenvalues = torch.zeros(SIZE)
    eigenvalues[:7] = torch.linspace(1, 8, 7)
    result = trace(Matrix(with_eigenvalues(eigenvalues)[0].float()), 30)
    assert abs(result.value - eigenvalues.sum()) < 1e-4
    assert result.standard_error < 1e-4


@pytest.mark.parametrize("products", [3, SIZE + 1])
def test_traces_that_cannot_be_are_refused(products):
    with pytest.raises(ValueError, match=rf"\[4, 300\].*got {products}: pass a number"):
        trace(Matrix(goe(SIZE)), products)
