"""Mean and variance of <S x, S y> over draws of S, against their formulas."""

import dataclasses
import math
from functools import partial
from itertools import combinations_with_replacement

import pytest
import torch

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, CounterRandom, Dense, Grouped
from hf_sketch.sketches.by_name import choose_factored
from tests.helpers.operators import hartley_variances, variances
from tests.helpers.operators.dense import hadamard

pytestmark = pytest.mark.usefixtures("short_sign_tables")

DRAWS = 400
SIZE, PADDED, SIZES = 250, 256, (8, 32)
BLOCK, BLOCK_SIZES = 64, (2, 32)

# Each with a formula of (x, y, out_size).
OPERATORS = [
    (Dense(SIZE, 32, 0), variances.dense),
    (FFD(SIZE, 32, 0), variances.ffd),
    (FJL(SIZE, 32, 0, samples=3), partial(variances.fjl, samples=3)),
    (FJL(SIZE, 32, 0, BLOCK, samples=3), partial(variances.fjl, samples=3, n=BLOCK)),
    (
        FJL(SIZE, 32, 0, mix="fft", samples=3),
        partial(hartley_variances.fjl, samples=3),
    ),
    (
        FJL(SIZE, 32, 0, mix="kronecker", samples=3),
        partial(variances.fjl_kronecker, samples=3, sizes=SIZES),
    ),
    (AFFD(SIZE, 16, 0), partial(variances.affd, sizes=SIZES)),
    (AFFD(SIZE, 64, 0), partial(variances.affd, sizes=SIZES)),
    (AFFD(SIZE, 32, 0, BLOCK), partial(variances.affd, sizes=BLOCK_SIZES)),
    (AFFD(SIZE, 64, 0, mix="fft"), hartley_variances.affd),
    (
        AFFD(SIZE, 64, 0, mix="kronecker"),
        partial(variances.affd_kronecker, sizes=SIZES),
    ),
    (AFJL(SIZE, 64, 0), partial(variances.afjl, sizes=SIZES)),
    (AFJL(SIZE, 32, 0, BLOCK), partial(variances.afjl, sizes=BLOCK_SIZES)),
    (AFJL(SIZE, 64, 0, mix="fft"), hartley_variances.afjl),
    (
        AFJL(SIZE, 64, 0, mix="kronecker"),
        partial(variances.afjl_kronecker, sizes=SIZES),
    ),
    (SRHT(SIZE, 16, 0), partial(variances.srht, sizes=SIZES)),
    (SRHT(SIZE, 16, 0, BLOCK), partial(variances.srht, sizes=BLOCK_SIZES)),
    (SRHT(SIZE, 64, 0, 32), partial(variances.srht, sizes=(32,))),
    (QK(SIZE, 16, 0), lambda x, y, _: variances.qk(x, y, (256,), (16,))),
    (
        QK(SIZE, 64, 0, (8, 32), (4, 16)),
        lambda x, y, _: variances.qk(x, y, (8, 32), (4, 16)),
    ),
    (
        QK(SIZE, 16, 0, rotation="signs"),
        lambda x, y, _: variances.qk_signs(x, y, (256,), (16,)),
    ),
    (
        QK(SIZE, 16, 0, (16, 16), (4, 4), rotation="signs"),
        lambda x, y, _: variances.qk_signs(x, y, (16, 16), (4, 4)),
    ),
    *(
        (
            Grouped(SIZE, out, 0, sides, widths),
            partial(variances.grouped, sides=sides, widths=widths),
        )
        for out, sides, widths in (
            (16, (10, 25), (16, 16)),
            (32, (25, 10), (16, 16)),
            (28, (25, 10), (32, 8)),
        )
    ),
]


def inputs(size):
    """Vectors of norm 1. Nothing but signs spreads the constant one."""
    constant = torch.full((size,), size**-0.5, dtype=torch.float64)
    noise = CounterRandom(0, "inputs").normals(0, size).double()
    block, sparse, aligned = torch.zeros(3, size, dtype=torch.float64)
    block[:32], sparse[77], aligned[[5, 5 + PADDED // 2]] = noise[:32], 1.0, 1.0
    vectors = {
        "constant": constant,
        "dense": constant + noise / noise.norm(),
        "in one block": block,
        "one-sparse": sparse,
        "two aligned": aligned,
    }
    return {name: vector / vector.norm() for name, vector in vectors.items()}


def inner_products(operator, vectors):
    """<S v_i, S v_j> of each draw of S: (DRAWS, i, j)."""
    columns = torch.stack(vectors, 1)
    sketches = torch.stack(
        [dataclasses.replace(operator, seed=seed) @ columns for seed in range(DRAWS)]
    )
    return sketches.mT @ sketches


def assert_draws_have(mean, variance, draws, what):
    """Within five standard errors; equal if there is no variance.

    The error of the variance is sqrt((k - 1) / DRAWS) of it. The kurtosis k is the
    sample's own, because no bound fits all operators and inputs: k is 1 for two values
    as likely, 3 for a sum of many terms and 15 for a single g^2.
    """
    if variance < 1e-12:  # rotations are float32 and the formulas cancel
        assert (draws - mean).abs().max() < 1e-6, what
        return
    squares = (draws - mean).square() / variance
    error = squares.std(correction=0) / squares.mean() / math.sqrt(DRAWS)
    assert abs(draws.mean() - mean) < 5 * math.sqrt(variance / DRAWS), what
    assert abs(squares.mean() - 1) < 5 * error + 1e-6, what


@pytest.mark.parametrize(
    ("operator", "formula"),
    OPERATORS,
    ids=[repr(operator) for operator, _ in OPERATORS],
)
def test_inner_products_have_the_mean_and_variance_of_the_formula(operator, formula):
    names, vectors = zip(*inputs(SIZE).items(), strict=True)
    draws = inner_products(operator, vectors)
    padded = [torch.nn.functional.pad(v, (0, PADDED - SIZE)) for v in vectors]
    for i, j in combinations_with_replacement(range(len(names)), 2):
        mean, variance = formula(padded[i], padded[j], operator.out_size)
        what = f"{names[i]}, {names[j]}"
        assert_draws_have(float(mean), float(variance), draws[:, i, j], what)


WITH_A_FORMULA = [
    (operator, formula)
    for operator, formula in OPERATORS
    if not isinstance(operator, (QK, Grouped))
    and getattr(operator, "mix", "") in ("", "hadamard")
]


@pytest.mark.parametrize(
    ("operator", "formula"),
    WITH_A_FORMULA,
    ids=[repr(operator) for operator, _ in WITH_A_FORMULA],
)
def test_operators_know_the_variance_of_the_squared_norm(operator, formula):
    rows = torch.stack(list(inputs(SIZE).values()))
    padded = torch.nn.functional.pad(rows, (0, PADDED - SIZE))
    wanted = [float(formula(x, x, operator.out_size)[1]) for x in padded]
    assert operator.square_variance(rows).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("sides", [(24, 40), (40, 24), (60, 60)])
def test_grouped_estimates_its_variance_from_above(sides):
    operator = choose_factored("grouped", sides, 64, 0, "")
    left, right = (CounterRandom(k, "side").normals(0, n) for k, n in enumerate(sides))
    dense = CounterRandom(2, "dense").normals(0, math.prod(sides)).double()
    one_row = dense.view(sides) * (torch.arange(sides[0]) == 3).unsqueeze(1)
    for x, most in ((dense, 1.3), (torch.outer(left, right), 1.4), (one_row, math.inf)):
        row = (x / x.norm()).flatten().double()
        exact = variances.grouped(row, row, 64, sides, operator.widths)[1]
        estimate = operator.square_variance(row.unsqueeze(0))
        assert exact <= 1.02 * float(estimate)
        assert math.isinf(most) or float(estimate) <= most * exact


@pytest.mark.parametrize("mix", ["fft", "kronecker"])
def test_other_transforms_have_no_formula_for_the_variance(mix):
    operator = AFFD(SIZE, 16, 0, mix=mix)
    with pytest.raises(ValueError, match=f"mix='{mix}'. Pass mix='hadamard'"):
        operator.square_variance(torch.ones(1, SIZE))


QK_INPUTS, QK_SEEDS = (32, 64), 25


@pytest.mark.parametrize("rotation", ["haar", "signs"])
@pytest.mark.parametrize("out", [(8, 16), (4, 64)])
def test_qk_reads_its_variance_off_its_sketches(rotation, out):
    """The mean of the estimates is the variance, within five of its errors.

    Of random signs, which scatter less than their sums over a bucket show, it is an
    upper bound.
    """
    left, right = (
        CounterRandom(k, "side").normals(0, n) for k, n in enumerate((32, 64))
    )
    dense = CounterRandom(2, "dense").normals(0, 32 * 64)
    rank_one = torch.outer(left, right).flatten()
    rows = torch.stack([rank_one / rank_one.norm(), dense / dense.norm()]).double()
    size = math.prod(out)
    operators = [
        QK(32 * 64, size, 100 * seed, QK_INPUTS, out, rotation=rotation)
        for seed in range(QK_SEEDS)
    ]
    found = torch.stack([operator.square_variance(rows) for operator in operators])
    formula = variances.qk if rotation == "haar" else variances.qk_signs
    error = found.std(0) / math.sqrt(QK_SEEDS)
    for row, mean, its_error in zip(rows, found.mean(0), error, strict=True):
        wanted = float(formula(row, row, QK_INPUTS, out)[1])
        assert mean > wanted - 5 * its_error
        if rotation == "haar":
            assert mean < wanted + 5 * its_error
            assert its_error < 0.15 * wanted


# D Var <S x, S y> measured with another implementation at 2**12 to D = 2**8, factors of
# 16, by 1500 draws (300 of the dense matrix), with standard errors of 4% to 10%: of two
# orthonormal dense vectors, and of x = y: dense, one-sparse, in one block of D, and the
# bad input of FFD.
MEASURED = {
    "dense": (variances.dense, (1.07, 1.69, 1.89, 2.18, 2.23)),
    "fjl, 16 samples": (
        partial(variances.fjl, samples=16),
        (1.12, 2.42, 1.99, 2.33, 2.33),
    ),
    "fjl, 144 samples": (
        partial(variances.fjl, samples=144),
        (1.03, 2.03, 1.96, 1.95, 2.13),
    ),
    # The variance in one block is that of the block drawn: not known here.
    "ffd": (variances.ffd, (1.10, 2.31, 1.99, math.nan, 497.0)),
    "affd": (partial(variances.affd, sizes=(16,) * 3), (1.08, 2.31, 2.10, 5.9, 6.0)),
    "afjl": (partial(variances.afjl, sizes=(16,) * 3), (2.65, 8.21, 1.92, 6.0, 5.9)),
    "srht": (partial(variances.srht, sizes=(16,) * 3), (0.92, 1.87, 0.0, 0.0, 0.0)),
    "qk": (
        lambda x, y, _: variances.qk(x, y, (16,) * 3, (8, 8, 4)),
        (0.99, 1.75, 169.0, 45.0, 167.0),
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_formulas_give_the_variances_that_were_measured(name):
    formula, measured = MEASURED[name]
    size, out = 2**12, 2**8
    x, y = CounterRandom(1, "inputs").normals(0, 2 * size).double().view(2, size)
    y -= (x @ y) / (x @ x) * x
    block, bad, sparse = torch.zeros(3, size, dtype=torch.float64)
    block[:out], bad[:out], sparse[17] = x[:out], hadamard(out)[1], 1.0
    x, y, block = x / x.norm(), y / y.norm(), block / block.norm()
    pairs = ((x, y), (x, x), (sparse, sparse), (block, block), (bad, bad))
    for pair, expected in zip(pairs, measured, strict=True):
        if not math.isnan(expected):
            variance = out * float(formula(*pair, out)[1])
            # Two of the largest standard errors.
            assert variance == pytest.approx(expected, rel=0.2, abs=1e-9)


@pytest.mark.parametrize(
    ("into", "out"), [((64,), (16,)), ((8, 32), (2, 8)), ((16, 16, 16), (8, 8, 4))]
)
def test_qk_has_its_documented_variance_on_inputs_of_rank_one(into, out):
    x = torch.ones(1, dtype=torch.float64)
    for axis, size in enumerate(into):
        factor = CounterRandom(axis, "factor").normals(0, size).double()
        x = torch.kron(x, factor / factor.norm())
    sizes = zip(into, out, strict=True)
    documented = math.prod(1 + 2 * (b - d) / (d * (b + 2)) for b, d in sizes) - 1
    assert float(variances.qk(x, x, into, out)[1]) == pytest.approx(documented)
