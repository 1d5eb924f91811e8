import math

import pytest
import torch

from hf_sketch import AFFD
from tests.helpers.operators.dense import dense_affd

DRAWS = 400


def squared_norms(x, out_size, **options):
    """|S x|^2 under independent seeds, for x of norm 1."""
    return torch.stack(
        [
            (AFFD(len(x), out_size, seed, **options) @ x).square().sum()
            for seed in range(DRAWS)
        ]
    )


@pytest.mark.parametrize("options", [{}, {"block_size": 64}])
def test_squared_norms_are_unbiased_with_variance_2_over_out_size(options):
    x = torch.nn.functional.normalize(torch.arange(1.0, 1025.0).cos(), dim=0).double()
    norms = squared_norms(x, 64, **options)
    # Var = 2/D (1 + O(D/n)); blocks of 64 have D/n = 1, hence the factor of 4 there.
    variance = 2 / 64 * (4 if options else 1.5)
    assert abs(norms.mean() - 1) < 5 * math.sqrt(variance / DRAWS)
    # A sample variance of near-Gaussian values has relative deviation sqrt(2/DRAWS).
    assert norms.var() < variance * (1 + 5 * math.sqrt(2 / DRAWS))


def test_inner_products_are_unbiased():
    x, y = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double()
    x, y = x / x.norm(), y / y.norm()
    got = torch.stack(
        [
            (operator @ x) @ (operator @ y)
            for operator in (AFFD(500, 64, seed, 128) for seed in range(DRAWS))
        ]
    )
    # Var <S x, S y> <= (1 + <x, y>^2) / D for Gaussians; twice that for D/n = 1/2.
    assert abs(got.mean() - x @ y) < 5 * math.sqrt(2 * (1 + (x @ y) ** 2) / 64 / DRAWS)


def test_aligned_coordinates_of_two_blocks_do_not_collide():
    # Only fresh signs tell the blocks apart; with them on the input alone, the two
    # columns would be equal up to sign and |S x|^2 would be 0 or 2.
    x = torch.zeros(512, dtype=torch.float64)
    x[3] = x[256 + 3] = 0.5**0.5
    norms = squared_norms(x, 64, block_size=256)
    assert norms.var() < 8 / 64


def test_a_longer_sketch_starts_with_the_shorter_one():
    x = torch.arange(1000.0, dtype=torch.float64).cos()
    for small, large in ((1, 2), (16, 32), (100, 200), (512, 1024)):
        short, long = AFFD(1000, small, 0) @ x, AFFD(1000, large, 0) @ x
        torch.testing.assert_close(long[:small] * 2**0.5, short, rtol=1e-12, atol=1e-12)


def test_streams_are_independent():
    one, other = (dense_affd(AFFD(256, 256, 0, stream=s)) for s in ("a", "b"))
    cosine = (one * other).sum() / (one.norm() * other.norm())
    assert abs(cosine) < 5 / 256


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two, got 100: pass 128"):
        AFFD(1000, 10, 0, block_size=100)
