"""Kernels that scale gradients as Adam does, before they sketch them."""

import math

import pytest
import torch

from hf_sketch import ModelSketch, Normalizer
from hf_sketch.model import gradient_pass
from tests.helpers.whole_gradients import (
    BFLOAT16,
    BLOCKED,
    DEVICE,
    FLOAT16,
    FLOAT32,
    SHAPES,
    assert_plain,
    begin,
    given,
    gradients_of,
)

pytest.importorskip("triton")

TENSORS = SHAPES[:-1]
LAYERS = (("a.0", (40, 40)), ("a.1", (40,)), ("b.0", (40, 40)), ("b.1", (7, 3)))


def normalizer_of(shapes):
    """Moments of all magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(5)
    moments = {}
    for name, shape in shapes:
        *rows, columns = shape or (1,)
        sides = (math.prod(rows), columns) if rows else (columns,)
        drawn = (torch.randn(n, generator=generator) for n in sides)
        moments[name] = tuple((3 * x).exp().where(x > -1.5, 0) for x in drawn)
    return Normalizer(moments, 3)


def scaled(shapes, out_size, layout="grouped", **settings):
    return ModelSketch(
        shapes, out_size, layout, normalizer=normalizer_of(shapes), **settings
    )


@pytest.mark.parametrize(
    ("sketch", "dtypes"),
    [
        (scaled(TENSORS, 256, seed=3), (FLOAT32,)),
        (scaled(TENSORS, 64), (BFLOAT16, FLOAT16)),
        (scaled(BLOCKED[1:], 100, "blocked"), (BFLOAT16,)),
        (scaled(LAYERS, 64, groups=("x", "x", "y", "y")), (FLOAT32,)),
        pytest.param(scaled(SHAPES, 700), (FLOAT32,), marks=pytest.mark.full),
        pytest.param(
            scaled(BLOCKED, 2100, "blocked"), (FLOAT32,), marks=pytest.mark.full
        ),
    ],
    ids=lambda x: f"{x.layout} {x.out_size}" if isinstance(x, ModelSketch) else "",
)
def test_a_scaled_gradient_has_the_plain_sketch(sketch, dtypes):
    assert_plain(sketch, gradients_of(sketch.shapes, *dtypes))


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_long_blocks_are_scaled(dtype):
    sketch = scaled(BLOCKED[1:], 100, "blocked", operator="affd")
    assert_plain(sketch, gradients_of(sketch.shapes, dtype))


def test_norms_are_those_of_the_gradient_itself():
    sketch = scaled(LAYERS, 64)
    gradients = gradients_of(LAYERS, FLOAT32)
    kept = begin(sketch, 8, 1e-6)
    kept.note(given(sketch, gradients))
    found = kept.finish(given(sketch, gradients), 1.0)
    norm = math.sqrt(sum(x.double().square().sum().item() for x in gradients.values()))
    assert float(found.norm) == pytest.approx(norm, rel=1e-5)
    assert float(found.clip_factor) == 1.0


def test_vectors_are_lifted_tensor_by_tensor(monkeypatch):
    monkeypatch.setattr(gradient_pass, "can_launch", lambda device: True)
    sketch = scaled(LAYERS, 64)
    assert sketch.whole_gradients.can_read(DEVICE)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert sketch.whole_gradients.lift(vector) is None
    gradients = gradients_of(LAYERS, FLOAT32)
    lifted = sketch.adjoint(vector)
    across = sum((x * lifted[name].cpu()).sum() for name, x in gradients.items())
    expected = vector.cpu() @ sketch.sketch(gradients)
    assert float(across) == pytest.approx(float(expected), rel=1e-4)
