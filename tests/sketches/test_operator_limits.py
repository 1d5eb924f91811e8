"""Inputs on which operators are weak, as their docstrings and the paper say."""

import functools
import math

import pytest
import torch

from hf_sketch import AFFD, AFJL, FFD, QK, SRHT, CounterRandom
from tests.helpers.operators.dense import hadamard

pytestmark = pytest.mark.usefixtures("short_sign_tables")

DRAWS = 300
SIZE, OUT = 4096, 256


def sparse(*places):
    x = torch.zeros(SIZE, dtype=torch.float64)
    x[list(places)] = len(places) ** -0.5
    return x


def dense_vector(seed=0):
    x = CounterRandom(seed, "x").normals(0, SIZE).double()
    return x / x.norm()


def in_one_block():
    x = torch.zeros(SIZE, dtype=torch.float64)
    x[:OUT] = dense_vector()[:OUT]
    return x / x.norm()


def ffd_bad():
    """Its first block's transform is one unit vector (theorem 3.1)."""
    x = torch.zeros(SIZE, dtype=torch.float64)
    x[:OUT] = hadamard(OUT)[1]
    return x


HARD = {
    "dense": dense_vector(),
    "one-sparse": sparse(17),
    "two-sparse, aligned in all powers of two": sparse(5, 5 + SIZE // 2),
    "many aligned": sparse(*range(3, SIZE, OUT)),
    "one block": in_one_block(),
    "bad for FFD": ffd_bad(),
}


@functools.cache
def all_norms(kind, *sizes):
    """|S x|^2 of every hard input and draw of S: (DRAWS, inputs)."""
    columns = torch.stack([*HARD.values()], 1)
    draws = (kind(SIZE, OUT, seed, *sizes) @ columns for seed in range(DRAWS))
    return torch.stack([sketches.square().sum(0) for sketches in draws])


def squared_norms(name, kind, *sizes):
    return all_norms(kind, *sizes)[:, list(HARD).index(name)]


def assert_unbiased_with_variance_at_most(norms, variance):
    # Five standard errors of the mean, and of the variance for a kurtosis up to 15.
    assert abs(norms.mean() - 1) < 5 * math.sqrt(variance / DRAWS) + 1e-9
    assert norms.var() < variance * (1 + 5 * math.sqrt(14 / DRAWS)) + 1e-12


@pytest.mark.parametrize("name", HARD)
def test_srht_in_blocks_has_no_weak_inputs(name):
    norms = squared_norms(name, SRHT, OUT)
    assert_unbiased_with_variance_at_most(norms, 2 / OUT)


@pytest.mark.parametrize("name", HARD)
def test_srht_in_segments_has_no_weak_inputs(name):
    norms = squared_norms(name, SRHT, OUT // 8)
    assert_unbiased_with_variance_at_most(norms, 2 / OUT)


@pytest.mark.parametrize("name", ["one-sparse", "one block", "bad for FFD"])
def test_srht_is_exact_within_a_block(name):
    norms = squared_norms(name, SRHT, OUT)
    torch.testing.assert_close(norms, torch.ones(DRAWS).double())


def test_srht_has_the_variance_of_its_formula():
    x, y = dense_vector(0), dense_vector(1)
    y = (x + 2 * y) / (x + 2 * y).norm()
    pair = torch.stack([x, y], 1)
    draws = (SRHT(SIZE, OUT, seed, OUT) @ pair for seed in range(3 * DRAWS))
    got = torch.stack([sketches[:, 0] @ sketches[:, 1] for sketches in draws])
    a, b = x.view(-1, OUT), y.view(-1, OUT)
    squares = torch.outer(a.square().sum(1), b.square().sum(1))
    products = torch.outer((a * b).sum(1), (a * b).sum(1))
    both = squares + products
    variance = float(both.sum() - both.diagonal().sum()) / OUT
    assert abs(got.mean() - x @ y) < 5 * math.sqrt(variance / (3 * DRAWS))
    assert abs(got.var() / variance - 1) < 5 * math.sqrt(2 / (3 * DRAWS))


@pytest.mark.parametrize("name", HARD)
def test_affd_has_no_input_as_bad_as_those_of_the_others(name):
    norms = squared_norms(name, AFFD)
    assert abs(norms.mean() - 1) < 5 * math.sqrt(16 / OUT / DRAWS)
    assert norms.var() < 16 / OUT


def test_ffd_fails_on_its_bad_input_with_the_variance_of_chi_squared():
    norms = squared_norms("bad for FFD", FFD)
    # |S x|^2 = g^2: variance 2, and the kurtosis of chi-squared gives its error.
    assert abs(norms.mean() - 1) < 5 * math.sqrt(2 / DRAWS)
    assert abs(norms.var() - 2) < 5 * math.sqrt(56 / DRAWS)


def test_afjl_needs_three_times_the_size_on_dense_inputs():
    x, y = dense_vector(0), dense_vector(1)
    y = (y - (x @ y) * x) / (y - (x @ y) * x).norm()
    pair = torch.stack([x, y], 1)
    draws = (AFJL(SIZE, OUT, seed) @ pair for seed in range(DRAWS))
    got = torch.stack([sketches[:, 0] @ sketches[:, 1] for sketches in draws])
    assert abs(got.mean()) < 5 * math.sqrt(3 / OUT / DRAWS)
    assert 2 < OUT * got.var() < 4


def test_afjl_loses_or_doubles_two_aligned_coordinates():
    norms = squared_norms("two-sparse, aligned in all powers of two", AFJL)
    # The kept rows give both coordinates one common sign: about 0 or about 2.
    assert ((norms < 1e-9) | (norms > 1)).all()
    assert norms.var() > 0.5


def test_qk_is_weak_on_sparse_inputs():
    norms = squared_norms("one-sparse", QK)
    one = 1 + 2 * (64 - 16) / (16 * (64 + 2))
    expected = one**2 - 1
    assert expected > 10 * 2 / OUT
    assert abs(norms.var() - expected) < 5 * expected * math.sqrt(8 / DRAWS)
