"""Operators on XLA's own CPU device: the same maps, in programs without look-ups.

The tests need torch_xla, which .ci/xla installs into an environment of its own.
"""

import re

import pytest
import torch

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Dense, Grouped, ModelSketch
from hf_sketch.sketches.transforms.random import CounterRandom
from hf_sketch.sketches.transforms.signs import flip, sign_masks
from tests.helpers.operators.device_oracles import assert_same_operator_on, random

torch_xla = pytest.importorskip("torch_xla")
metrics = pytest.importorskip("torch_xla.debug.metrics")

pytestmark = pytest.mark.xla

MIXES = ("hadamard", "kronecker")  # torch_xla computes an FFT on the CPU
WITHOUT_LOOK_UPS = [
    *(AFFD(1000, 64, 2, mix=mix) for mix in MIXES),
    *(AFFD(5000, 100, 4, 128, mix=mix) for mix in MIXES),
    *(AFJL(1000, 70, 2, mix=mix) for mix in MIXES),
    *(AFJL(5000, 100, 4, 256, mix=mix) for mix in MIXES),
    QK(1000, 60, 2),
    QK(2**12 + 1, 64, 3),
    QK(60, 16, 0, in_factors=(10, 6), out_factors=(4, 4), rotation="signs"),
    Grouped(360, 64, 3, (60, 6), (32, 8)),
    Grouped(480, 60, 2, (4, 5, 24), (8, 16)),
]
OPERATORS = [
    *WITHOUT_LOOK_UPS,
    AFFD(1000, 64, 2, mix="fft"),
    SRHT(1000, 64, 2),
    SRHT(5000, 128, 4, 128),
    SRHT(5000, 300, 4, 64, stream="w"),
    FJL(1000, 64, 2),
    FFD(1000, 60, 2),
    Dense(1000, 60, 2),
]

each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=repr)


@each_operator
def test_operators_are_those_of_the_cpu(operator):
    assert_same_operator_on(torch_xla.device(), operator)


def test_random_words_have_the_bits_of_the_cpu():
    rng = CounterRandom(3, "a role")
    expected = rng.words(2**32 - 500, 1000)
    got = rng.words(2**32 - 500, 1000, torch_xla.device())
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_flipped_bit_for_bit_as_on_the_cpu(dtype):
    masks = sign_masks(CounterRandom(3, "signs"), 7, 1000)
    x = random(2, 1000).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, 1e-30])
    device = torch_xla.device()
    expected, got = flip(x, masks), flip(x.to(device), masks.to(device)).cpu()
    assert torch.equal(got.signbit(), expected.signbit())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("operator", WITHOUT_LOOK_UPS, ids=repr)
def test_the_programs_of_affd_afjl_and_qk_have_no_look_ups(operator):
    x = random(1, operator.in_size).to(torch_xla.device())
    y = random(1, operator.out_size).to(torch_xla.device())
    for result in (operator.apply_rows(x), operator.adjoint_rows(y)):
        names = operations(result)
        assert names & {"dot_general", "reduce"}  # the operator's work is in it
        assert not {name for name in names if "gather" in name or "scatter" in name}


def test_the_program_of_an_operator_with_look_ups_is_recognized():
    x = random(1, 1000).to(torch_xla.device())
    assert "gather" in operations(FJL(1000, 64, 0).apply_rows(x))


def operations(result):
    """Names of the operations of the program that computes a tensor."""
    text = torch_xla._XLAC._get_stablehlo([result], str(result.device), [], False)
    return set(re.findall(r"stablehlo\.(\w+)", text.decode()))


@pytest.mark.parametrize("layout", ["grouped", "blocked", "factored", "flat"])
def test_a_sketched_gradient_is_that_of_the_cpu_and_no_number_is_read(layout):
    shapes = (("table", (300, 64)), ("weight", (300, 260)), ("bias", (260,)))
    sketch = ModelSketch(shapes, 256, layout)
    gradients = {name: random(*shape) for name, shape in shapes}
    away = {name: x.to(torch_xla.device()) for name, x in gradients.items()}
    torch_xla.sync()
    before = reads()
    got = sketch.sketch(away)
    torch_xla.sync()
    assert reads() == before
    torch.testing.assert_close(
        got.cpu(), sketch.sketch(gradients), rtol=1e-5, atol=1e-4
    )


def reads():
    """How often numbers were brought to the CPU so far."""
    return (metrics.metric_data("TransferFromDeviceTime") or (0,))[0]
