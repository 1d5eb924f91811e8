import math

import pytest
import torch

from hf_sketch import QK, CounterRandom
from hf_sketch.sketches.qk import balanced_powers

DRAWS = 400


def squared_norms(x, **sizes):
    return torch.stack(
        [
            (QK(len(x), sizes["out_size"], seed, *sizes["factors"]) @ x).square().sum()
            for seed in range(DRAWS)
        ]
    )


def test_squared_norms_of_dense_inputs_are_unbiased_with_variance_2_over_out_size():
    x = CounterRandom(0, "x").normals(0, 1024).double()
    norms = squared_norms(x / x.norm(), out_size=64, factors=((32, 32), (8, 8)))
    assert abs(norms.mean() - 1) < 5 * math.sqrt(2 / 64 * 2 / DRAWS)
    assert norms.var() < 2 / 64 * 2


def test_a_sparse_input_has_the_documented_variance():
    x = torch.zeros(1024, dtype=torch.float64)
    x[5] = 1.0
    norms = squared_norms(x, out_size=64, factors=((32, 32), (8, 8)))
    one = 1 + 2 * (32 - 8) / (8 * (32 + 2))
    expected = one**2 - 1
    # |S x|^2 is a product of two scaled betas; its kurtosis stays below 9.
    assert abs(norms.var() - expected) < 5 * expected * math.sqrt(8 / DRAWS)


def test_the_rotations_have_orthonormal_rows():
    operator = QK(300 * 20, 32, 0, (300, 20), (8, 4))
    matrix = operator @ torch.eye(6000, dtype=torch.float64)
    gram = matrix @ matrix.T * 32 / 6000
    torch.testing.assert_close(gram, torch.eye(32).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "ceilings", "expected"),
    [
        (12, (1024, 1024), (64, 64)),
        (13, (1024, 1024), (64, 128)),
        (12, (16, 1024), (16, 256)),
        (3, (4,), None),
    ],
)
def test_powers_are_balanced_below_their_ceilings(bits, ceilings, expected):
    assert balanced_powers(bits, ceilings) == expected


def test_no_default_factor_is_cut_to_one():
    for in_size in (2**12, 2**20, 2**27, 10**6):
        into, out = QK(in_size, 2**10, 0)._sizes
        assert math.prod(into) >= in_size
        assert math.prod(out) == 2**10
        assert max(out) <= 2 * min(out)


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"in_factors .* got \(10,\) and \(4, 4\)"):
        QK(60, 16, 0, (10,), (4, 4))
    with pytest.raises(ValueError, match=r"in_factors .* got \(10, 5\) and \(4, 4\)"):
        QK(60, 16, 0, (10, 5), (4, 4))
    with pytest.raises(ValueError, match=r"out_factors .* at least out_size=32"):
        QK(60, 32, 0, (10, 6), (4, 4))
