"""Kernels for blocks that are longer than registers give the plain sketch."""

import pytest
import torch

from hf_sketch import ModelSketch
from hf_sketch.sketches.transforms.mixing import mix_rows, mixing
from hf_sketch.sketches.transforms.random import CounterRandom
from tests.helpers.whole_gradients import (
    BFLOAT16,
    BLOCKED,
    DEVICE,
    FLOAT16,
    FLOAT32,
    SHAPES,
    assert_plain,
    begin,
    gradients_of,
)

pytest.importorskip("triton")

LONG = ("affd", "afjl", "fjl")


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize(
    ("operator", "layout", "out_size"),
    [
        ("affd", "grouped", 700),
        ("affd", "blocked", 2100),
        ("afjl", "blocked", 700),
        ("fjl", "blocked", 700),
        pytest.param("affd", "blocked", 100, marks=pytest.mark.full),
        pytest.param("affd", "grouped", 1, marks=pytest.mark.full),
        pytest.param("affd", "grouped", 2**13, marks=pytest.mark.full),
        pytest.param("afjl", "grouped", 2100, marks=pytest.mark.full),
        pytest.param("fjl", "grouped", 2100, marks=pytest.mark.full),
    ],
)
def test_long_blocks_have_the_plain_sketch(operator, layout, out_size):
    """Also of a vector whose block is shorter than the others'."""
    shapes = SHAPES if layout == "grouped" else BLOCKED
    sketch = ModelSketch(shapes, out_size, layout, seed=3, operator=operator)
    assert_plain(sketch, gradients_of(shapes, FLOAT32))


@pytest.mark.full
@pytest.mark.parametrize(
    ("operator", "bits"), [("affd", 16), ("fjl", 16), ("afjl", 18)]
)
def test_the_longest_blocks_have_the_plain_sketch(operator, bits):
    """Of two and of eight times 2**15 elements."""
    shapes = (("a", (2**bits + 5,)), ("b", (300,)))
    out_size = 3000 if bits == 16 else 2**16 + 2**15
    sketch = ModelSketch(shapes, out_size, "blocked", operator=operator)
    assert_plain(sketch, gradients_of(shapes, FLOAT32))


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize("operator", LONG)
def test_long_blocks_are_the_definition_in_float64(operator):
    """Dense matrices of a block's transform, and of what makes a sketch of the sum."""
    size, out_size = 2**16 + 3, 64
    sketch = ModelSketch((("a", (size,)),), out_size, "blocked", 1, operator)
    own = sketch.operators["a"]
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    got = begin(sketch).sketch([x.to(DEVICE)])
    block, columns = own.block, own.mixed_shape[1]
    eye = torch.eye(block, dtype=torch.float64)
    first = mix_rows(eye, mixing("hadamard", block, 1, own.permuted), columns).T
    last = own.finish(torch.eye(columns, dtype=torch.float64)).T
    padded = torch.nn.functional.pad(x.double(), (0, -size % block)).view(-1, block)
    total = torch.zeros(columns, dtype=torch.float64)
    for number, part in enumerate(padded):
        before, after = (signs_of(own, role, number) for role in ("before", "after"))
        total += after[:columns] * (first @ (before * part))
    expected = last @ total
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=atol)


def signs_of(operator, role, number):
    """The signs of a block, drawn one after the other."""
    signs, block = operator.signs(role), operator.block
    run, start = divmod(number * block, signs.run)
    (offset,) = signs.offsets(run, 1)
    words = CounterRandom(operator.seed, f"signs-{role}").words(0, 2**16).tolist()
    places = [offset + start + i for i in range(block)]
    return torch.tensor([1.0 - 2 * (words[i // 32] >> i % 32 & 1) for i in places])


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize("operator", LONG)
def test_signs_and_places_of_long_blocks_are_the_same_bits(operator):
    """One number at a time: what becomes of it has the sign and the place it has."""
    size = 2**16 + 9
    sketch = ModelSketch((("a", (size,)),), 64, "blocked", 5, operator)
    kept = begin(sketch)
    for place in (4096 + 33, size - 1):
        x = torch.zeros(size)
        x[place] = 1.0
        got, expected = kept.sketch([x.to(DEVICE)]).cpu(), sketch.sketch({"a": x})
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize(
    "dtypes",
    [(BFLOAT16,), (FLOAT16,), (BFLOAT16, FLOAT32, FLOAT16)],
    ids=["bfloat16", "float16", "mixed"],
)
def test_long_blocks_are_read_in_short_dtypes(dtypes):
    shapes = (("a", (2**16 + 8,)), ("b", (33,)), ("c", (2**16,)))
    sketch = ModelSketch(shapes, 64, "blocked", operator="affd")
    assert_plain(sketch, gradients_of(shapes, *dtypes))
