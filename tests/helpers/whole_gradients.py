"""Gradients of many tensors, their sketch by kernels, and the plain one beside it."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = {"cpu": 1e-6, "cuda": 1e-5}[DEVICE.type]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# Odd sizes, one element and none; matrices longer than their widths along either side,
# and both; experts; a side that is shorter than its width; one that is in blocks.
SHAPES = (
    ("table", (150, 40)),
    ("one", ()),
    ("wide", (33, 150)),
    ("none", (0,)),
    ("bias", (1029,)),
    ("experts", (3, 35, 33)),
    ("vector", (2**16 + 1,)),
)
# Of three matrices in blocks and one that is packed.
BLOCKED = (("a", (2**16,)), ("b", (2**8, 2**8 + 3)), ("c", (300,)))


def gradients_of(shapes, *dtypes, seed=0):
    """Normal numbers by name, of each dtype in turn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
        for i, (name, shape) in enumerate(shapes)
    }


def begin(sketch, *settings):
    return sketch.whole_gradients.begin(DEVICE, *settings)


def given(sketch, gradients):
    """In the order of the map, those that are there."""
    found = [gradients.get(name) for name, _ in sketch.shapes]
    return [None if x is None else x.to(DEVICE) for x in found]


def assert_plain(sketch, gradients, got=None):
    """The kernels' sketch in float32 is that of the plain path in float64."""
    if got is None:
        got = begin(sketch).sketch(given(sketch, gradients))
    assert got.dtype == FLOAT32
    wide = {name: x.double() for name, x in gradients.items()}
    expected = sketch.sketch(wide)
    atol = PRECISION * expected.abs().max().item()
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=atol)
