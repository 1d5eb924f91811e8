"""Laws of every operator. A new operator joins by one entry in OPERATORS."""

import dataclasses
import functools
import json
import subprocess
import sys

import pytest
import torch

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Composed, Dense, Grouped
from tests.helpers.operators.dense import (
    dense_affd,
    dense_afjl,
    dense_dense,
    dense_ffd,
    dense_fjl,
    dense_grouped,
    dense_qk,
    dense_srht,
)

MIXES = ("hadamard", "fft", "kronecker")
OPERATORS = [
    (AFFD(1, 1, seed=0), dense_affd),
    (AFFD(2**10 + 1, 100, seed=3), dense_affd),
    (AFFD(64, 64, seed=3), dense_affd),
    (AFFD(384, 512, seed=5, block_size=512, stream="bias"), dense_affd),
    *((AFFD(7, 8, seed=1, mix=mix), dense_affd) for mix in MIXES),
    *((AFFD(1000, 64, seed=2, mix=mix), dense_affd) for mix in MIXES),
    *((AFFD(5000, 100, 4, block_size=128, mix=mix), dense_affd) for mix in MIXES),
    (AFJL(1, 1, seed=0), dense_afjl),
    *((AFJL(7, 8, seed=1, mix=mix), dense_afjl) for mix in MIXES),
    *((AFJL(1000, 70, seed=2, mix=mix), dense_afjl) for mix in MIXES),
    *((AFJL(5000, 100, 4, block_size=256, mix=mix), dense_afjl) for mix in MIXES),
    (FJL(1, 1, seed=0), dense_fjl),
    *((FJL(7, 8, seed=1, mix=mix), dense_fjl) for mix in MIXES),
    *((FJL(1000, 64, seed=2, mix=mix, samples=3), dense_fjl) for mix in MIXES),
    (FJL(5000, 100, seed=4, block_size=128), dense_fjl),
    (SRHT(1, 1, seed=0), dense_srht),
    (SRHT(7, 8, seed=1), dense_srht),
    (SRHT(1000, 64, seed=2), dense_srht),
    (SRHT(5000, 100, seed=4, block_size=256), dense_srht),
    (SRHT(5000, 128, seed=4, block_size=128), dense_srht),
    (SRHT(5000, 300, seed=4, block_size=64, stream="w"), dense_srht),
    (FFD(1, 1, seed=0), dense_ffd),
    (FFD(7, 8, seed=1), dense_ffd),
    (FFD(1000, 60, seed=2, stream="w"), dense_ffd),
    (Dense(1, 1, seed=0), dense_dense),
    (Dense(1000, 60, seed=2, stream="w"), dense_dense),
    (QK(1, 1, seed=0), lambda op: dense_qk(op, (1,), (1,))),
    (QK(7, 5, seed=1), lambda op: dense_qk(op, (8,), (8,))),
    (QK(1000, 60, seed=2), lambda op: dense_qk(op, (1024,), (64,))),
    (QK(2**12 + 1, 64, seed=3), lambda op: dense_qk(op, (64, 128), (8, 8))),
    (
        QK(60, 16, 0, in_factors=(10, 6), out_factors=(4, 4), rotation="signs"),
        lambda op: dense_qk(op, (10, 6), (4, 4)),
    ),
    (
        QK(2000, 4, 0, in_factors=(500, 4), out_factors=(2, 2), rotation="signs"),
        lambda op: dense_qk(op, (500, 4), (2, 2)),
    ),
    (
        QK(60, 16, 0, in_factors=(10, 6), out_factors=(4, 4), stream="w"),
        lambda op: dense_qk(op, (10, 6), (4, 4)),
    ),
    (Grouped(1, 1, 0, sides=(1, 1), widths=(1, 1)), dense_grouped),
    (Grouped(360, 64, 3, sides=(60, 6), widths=(32, 8), stream="w"), dense_grouped),
    (Grouped(114, 60, 1, sides=(19, 6), widths=(16, 16)), dense_grouped),
    (Grouped(480, 64, 2, sides=(4, 5, 24), widths=(8, 16)), dense_grouped),
    (
        AFFD(100, 20, seed=1) @ QK(1000, 100, seed=2),
        lambda op: dense_affd(op.outer) @ dense_qk(op.inner, (1024,), (128,)),
    ),
]
each_operator = pytest.mark.parametrize(
    ("operator", "dense"),
    [(operator, functools.cache(dense)) for operator, dense in OPERATORS],
    ids=[repr(operator) for operator, _ in OPERATORS],
)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator())


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@each_operator
def test_it_is_the_dense_matrix(operator, dense):
    matrix = dense(operator)
    assert operator.shape == matrix.shape
    assert operator.T.shape == matrix.T.shape
    assert operator.T.T is operator
    x, y = random(operator.shape[1]), random(operator.shape[0])
    assert_close(operator @ x, matrix @ x)
    assert_close(operator.T @ y, matrix.T @ y)


@each_operator
def test_columns_and_rows(operator, dense):
    matrix = dense(operator)
    x, y = random(operator.shape[1], 3), random(operator.shape[0], 3)
    assert_close(operator @ x, matrix @ x)
    assert_close(operator.T @ y, matrix.T @ y)
    assert_close(x.T @ operator.T, x.T @ matrix.T)
    assert_close(y.T @ operator, y.T @ matrix)


@each_operator
def test_the_transpose_is_the_adjoint(operator, dense):
    x, y = random(operator.shape[1]), random(operator.shape[0])
    assert_close((operator @ x) @ y, x @ (operator.T @ y))


@each_operator
def test_an_outer_product_is_sketched_as_if_it_were_formed(operator, dense):
    matrix = dense(operator)
    width = next(n for n in (6, 5, 4, 3, 7, 1) if operator.shape[1] % n == 0)
    height = operator.shape[1] // width
    left, right = random(2, 3, height), random(2, 3, width)
    formed = torch.einsum("bti,btj->bij", left, right).flatten(1)
    assert_close(operator.apply_outer(left, right), formed @ matrix.T)
    ids = torch.arange(6).view(2, 3) * 5 % height
    one_hot = torch.nn.functional.one_hot(ids, height).double()
    formed = torch.einsum("bti,btj->bij", one_hot, right).flatten(1)
    assert_close(operator.apply_outer(ids, right), formed @ matrix.T)


@pytest.mark.parametrize("operator", [op for op, _ in OPERATORS if type(op) is Grouped])
def test_a_part_of_the_coordinates_is_sketched_as_if_others_were_zero(operator):
    matrix, size = dense_grouped(operator), operator.in_size
    for start, stop in ((0, size), (size // 3, size), (size // 4, size // 2)):
        part = random(2, stop - start)
        got = operator.apply_part(part, start)
        assert_close(got, part @ matrix[:, start:stop].T)


@each_operator
def test_it_is_the_same_after_a_trip_through_json(operator, dense):
    if isinstance(operator, Composed):
        operator = operator.outer
    fields = json.loads(json.dumps(dataclasses.asdict(operator)))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    again = type(operator)(**fields)
    assert again == operator
    assert hash(again) == hash(operator)
    x = random(operator.shape[1])
    assert torch.equal(again @ x, operator @ x)


@each_operator
@pytest.mark.usefixtures("no_generator_use")
def test_the_global_generator_is_not_touched(operator, dense):
    dataclasses.replace(operator) @ random(operator.shape[1])


@each_operator
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.full),
        torch.bfloat16,
    ],
)
def test_sums_are_kept_in_float32_at_least(operator, dense, dtype):
    x = random(operator.shape[1]).to(dtype)
    got = operator @ x
    assert got.dtype == torch.float32
    expected = (dense(operator) @ x.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_operator
def test_an_empty_batch_stays_empty(operator, dense):
    assert (random(0, operator.shape[1]) @ operator.T).shape == (0, operator.shape[0])
    assert (random(0, operator.shape[0]) @ operator).shape == (0, operator.shape[1])


@each_operator
def test_strided_input_is_read_right(operator, dense):
    x = random(operator.shape[1], 2)[:, 1]
    assert torch.equal(operator @ x, operator @ x.clone())


@each_operator
def test_bad_input_is_named(operator, dense):
    with pytest.raises(ValueError, match=f"must have {operator.shape[1]} elem"):
        operator @ random(operator.shape[1] + 1)
    with pytest.raises(TypeError, match=r"got torch.int64: call .float\(\)"):
        operator @ torch.ones(operator.shape[1], dtype=torch.int64)


def test_another_process_draws_the_same_bits():
    script = (
        "import torch\n"
        "from hf_sketch import AFFD, QK\n"
        "x = torch.arange(5000.0).cos()\n"
        "for operator in (AFFD(5000, 64, 0, 256), QK(5000, 64, 0)):\n"
        "    print((operator @ x).view(torch.int32).tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    x = torch.arange(5000.0).cos()
    ours = [
        (operator @ x).view(torch.int32).tolist()
        for operator in (AFFD(5000, 64, 0, 256), QK(5000, 64, 0))
    ]
    assert run.stdout.splitlines() == [str(line) for line in ours]
