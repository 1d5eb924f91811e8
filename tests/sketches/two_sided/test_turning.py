"""Kernels fold and rotate sides as the plain path does, interpreted if need be."""

import pytest
import torch

from hf_sketch import Grouped
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.two_sided import turning
from hf_sketch.sketches.two_sided.turning import can_turn, together, turn, turn_softmax
from tests.helpers.folded_sides import launch_everywhere

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = {"cpu": 1e-6, "cuda": 1e-5}[DEVICE.type]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def with_kernels(monkeypatch):
    """Kernels are launched wherever tensors are."""
    launch_everywhere(monkeypatch)


def operator_of(sides, widths, out_size=64, stream="w"):
    size = torch.Size(sides).numel()
    return Grouped(size, out_size, 3, sides, widths, stream)


# Sides shorter than their width, longer, many times as long; some groups left out.
OPERATORS = [
    operator_of((40, 33), (32, 8)),
    operator_of((5, 150), (8, 64)),
    operator_of((70, 16), (64, 16)),
    operator_of((40, 33), (32, 32), out_size=60),
    operator_of((40, 70), (64, 64), out_size=4096),
    operator_of((40, 70), (64, 64), out_size=64),
]


def vectors(operator, side, dtype=FLOAT32, examples=2, tokens=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = examples, tokens, operator.sides[side]
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def expected_of(operator, side, x):
    """What the plain path makes of it, in float64."""
    of = operator._sides_at(torch.empty(0, dtype=torch.float64))[side]
    return of.turn(of.fold(Side(x.cpu().double())))


def assert_plain(got, operator, side, x):
    expected = expected_of(operator, side, x)
    assert got.dtype == FLOAT32
    precision = PRECISION * float(expected.abs().max())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=precision)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("out_size", [700, 2**12, 2**16])
@pytest.mark.parametrize("count", [1, 3])
def test_a_device_turns_long_vectors_as_the_cpu_does(count, out_size, dtype):
    bits = (out_size - 1).bit_length()
    widths = (2 ** ((bits + 6) // 2),) * 2
    sides = [
        (operator_of((4096, 3000), widths, out_size, str(number)), 1)
        for number in range(count)
    ]
    x = vectors(*sides[0], dtype, examples=3, tokens=65)
    for places in together(sides):
        some = [sides[place] for place in places]
        for got, side in zip(turn(x, some), some, strict=True):
            assert_plain(got, *side, x)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_is_folded_and_rotated(operator, side):
    x = vectors(operator, side)
    assert_plain(turn(x, [(operator, side)])[0], operator, side, x)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_short_dtypes_are_read_as_they_are(dtype):
    operator = OPERATORS[0]
    x = vectors(operator, 1, dtype)
    assert_plain(turn(x, [(operator, 1)])[0], operator, 1, x)


@pytest.mark.parametrize("tokens", [1, 16, 35])
def test_signs_and_orders_are_the_same_bits(tokens):
    """Small integers: no sum is rounded."""
    operator = OPERATORS[4]
    x = (4 * vectors(operator, 1, tokens=tokens)).round()
    got = turn(x, [(operator, 1)])[0]
    assert torch.equal(got.cpu().double(), expected_of(operator, 1, x))


@pytest.mark.parametrize("count", [2, 3])
def test_several_sides_take_one_input_in_one_launch(count):
    sides = [(operator_of((24, 70), (32, 32), stream=str(i)), 1) for i in range(count)]
    x = vectors(*sides[0])
    for got, side in zip(turn(x, sides), sides, strict=True):
        assert_plain(got, *side, x)


@pytest.mark.parametrize("count", [1, 3])
def test_sides_have_scales_of_their_own(count):
    sides = [(operator_of((24, 70), (32, 32), stream=str(i)), 1) for i in range(count)]
    x = vectors(*sides[0], BFLOAT16)
    scales = [
        (3 * vectors(*side, seed=5 + i)[0, 0]).exp() for i, side in enumerate(sides)
    ]
    for got, scale, side in zip(turn(x, sides, scales), scales, sides, strict=True):
        assert_plain(got, *side, x.double() * scale)


def test_sides_of_other_sizes_are_launched_apart():
    small, large = operator_of((24, 70), (32, 32)), operator_of((24, 70), (64, 64))
    sides = [(small, 1), (large, 1), (small, 1)]
    assert together(sides) == [[0, 2], [1]]
    wide = Grouped(4096**2, 2**18, 0, (4096, 4096), (4096, 4096))
    assert together([(wide, 1)] * 5) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1, :1].expand(x.shape),
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    ],
    ids=["examples last", "tokens last", "shared", "a part"],
)
def test_vectors_may_lie_in_any_way(change):
    operator = OPERATORS[0]
    x = change(vectors(operator, 1))
    assert_plain(turn(x, [(operator, 1)])[0], operator, 1, x)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("operator", [OPERATORS[0], OPERATORS[1], OPERATORS[3]])
def test_sketches_of_outer_products_are_those_of_their_sum(operator):
    """Of the matrices themselves, in float64; also of one-hot vectors."""
    left, right = (vectors(operator, side, seed=side) for side in (0, 1))
    got = operator.apply_outer(left, right)
    matrices = (left.double().mT @ right.double()).flatten(1).cpu()
    expected = operator.apply_rows(matrices)
    precision = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=precision)
    ids = torch.arange(left.shape[1], device=DEVICE).remainder(operator.sides[0])
    ids = ids.expand(len(left), -1)
    hot = torch.nn.functional.one_hot(ids, operator.sides[0]).to(FLOAT32)
    got, expected = (operator.apply_outer(x, right) for x in (ids, hot))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=precision)


@pytest.mark.usefixtures("with_kernels")
def test_what_the_kernel_does_not_know_is_left_to_the_plain_path():
    operator, like = OPERATORS[0], torch.empty(2, 64, device=DEVICE)
    x = vectors(operator, 1)
    of = operator, 1
    assert can_turn(Side(x), of, like)
    assert not can_turn(Side(x), of, like.double())
    assert not can_turn(Side(x.double()), of, like)
    assert not can_turn(Side(torch.ones_like(x[..., 0]).long()), of, like)
    assert not can_turn(Side(x, folded=True), of, like)
    assert not can_turn(Side(x, expert=x[..., 0].long()), of, like)
    assert not can_turn(Side(x, scale=x[0, 0].double()), of, like)
    many = operator_of((128, 128), (128, 128), 128)
    assert not can_turn(Side(vectors(many, 1)), (many, 1), like)


def test_the_cpu_launches_no_kernel():
    assert not turning.launches(torch.device("cpu"))


def softmax_less_one_hot(scores, chosen, scale):
    """In float64."""
    vectors = (scale * scores.double()).softmax(-1)
    return vectors - torch.nn.functional.one_hot(chosen, vectors.shape[-1])


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_scores_are_folded_as_the_gradients_of_their_losses(operator, scale):
    scores = 10 * vectors(operator, 0)
    chosen = torch.arange(38, device=DEVICE).view(2, 19) * 5 % scores.shape[-1]
    got = turn_softmax(scores, chosen, scale, (operator, 0))
    x = softmax_less_one_hot(scores, chosen, scale)
    assert_plain(got, operator, 0, x)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("tokens", [1, 16, 35])
def test_scores_of_any_size_are_read_as_they_are(dtype, tokens):
    """Exponentials of some would be zero, or infinite."""
    operator = OPERATORS[2]
    scores = vectors(operator, 0, dtype, tokens=tokens)
    scores[0] += 3000
    scores[1] -= 3000
    scores[:, :, :-3] = -torch.inf  # whole tiles, and first
    chosen = torch.full(scores.shape[:2], scores.shape[2] - 2, device=DEVICE)
    chosen[0] += 1
    got = turn_softmax(scores, chosen, 1.0, (operator, 0))
    assert_plain(got, operator, 0, softmax_less_one_hot(scores, chosen, 1.0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_device_folds_scores_of_many_tokens(dtype):
    operator = operator_of((50257, 64), (512, 64), 2**12)
    scores = 5 * vectors(operator, 0, dtype, examples=3, tokens=65)
    chosen = torch.arange(3 * 65, device=DEVICE).view(3, 65) * 257
    got = turn_softmax(scores, chosen, 1.0, (operator, 0))
    assert_plain(got, operator, 0, softmax_less_one_hot(scores, chosen, 1.0))
