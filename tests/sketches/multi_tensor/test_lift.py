"""Kernels lift a vector to all tensors at once as the transpose does."""

import math

import pytest
import torch

from hf_sketch import ModelSketch, Normalizer
from hf_sketch.sketches.multi_tensor.lift import Lift
from tests.helpers.launches import note_launches
from tests.helpers.whole_gradients import (
    BFLOAT16,
    BLOCKED,
    DEVICE,
    FLOAT16,
    FLOAT32,
    SHAPES,
    gradients_of,
)

pytest.importorskip("triton")

SMALL = (("a", (40, 40)), ("b", (40,)), ("c", (3,)))
# Of one rounding; the interpreter cuts numbers off to bfloat16 instead.
ATOL = {FLOAT32: 1e-6, BFLOAT16: 2**-7, FLOAT16: 2**-11}


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, wherever tensors are."""
    return note_launches(monkeypatch, Lift)


def vector_of(sketch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sketch.row_size, generator=generator).to(DEVICE)


def assert_lifted(sketch, vector, found, base=None):
    """The lifted tensors are those of the plain path in float64, rounded once."""
    expected = dict(sketch.adjoint_parts(vector.cpu().double()))
    assert [*found] == [*expected]
    for name, x in found.items():
        wide = expected[name] + (0 if base is None else base[name].double())
        limit = ATOL[x.dtype] * (1 + wide.abs())
        assert ((x.cpu().double() - wide).abs() <= limit).all(), name


@pytest.mark.parametrize(
    "sketch",
    [
        ModelSketch(SHAPES, 256, "grouped", seed=3),
        ModelSketch(SHAPES, 700, "grouped"),
        ModelSketch(BLOCKED, 100, "blocked", seed=3),
        pytest.param(ModelSketch(BLOCKED, 2100, "blocked"), marks=pytest.mark.full),
        pytest.param(ModelSketch(SHAPES, 1024, "grouped"), marks=pytest.mark.full),
    ],
    ids=lambda sketch: f"{sketch.layout} {sketch.out_size}",
)
def test_a_lifted_vector_is_the_plain_one(sketch, launched):
    vector = vector_of(sketch)
    assert_lifted(sketch, vector, sketch.adjoint(vector))
    assert set(launched) == {"lift_blocks", "lift_matrices", "spread"} - (
        {"lift_matrices"} if sketch.layout == "blocked" else set()
    )


def test_a_lift_is_the_transpose_of_the_sketch(launched):
    """<v, S x> = <S.T v, x>, by kernels on both sides."""
    groups = ("x", "x", "y")
    sketch = ModelSketch(SMALL, 64, "grouped", seed=2, groups=groups)
    vector, gradients = vector_of(sketch), gradients_of(SMALL, FLOAT32)
    away = {name: x.to(DEVICE) for name, x in gradients.items()}
    lifted = sketch.adjoint(vector)
    assert launched
    there = sum(float((lifted[n] * x).double().sum()) for n, x in away.items())
    here = float((vector * sketch.sketch(away)).double().sum())
    assert there == pytest.approx(here, rel=1e-5, abs=1e-4)
    assert_lifted(sketch, vector, lifted)


@pytest.mark.parametrize(
    "dtypes",
    [(FLOAT32,), (BFLOAT16,), (FLOAT16, FLOAT32, BFLOAT16)],
    ids=["float32", "bfloat16", "mixed"],
)
def test_what_is_lifted_is_added_to_a_base_and_rounded_once(dtypes):
    shapes = (*SHAPES[:-2], ("vector", (2**16 + 8,)))
    sketch = ModelSketch(shapes, 64, "grouped", seed=1)
    base = gradients_of(shapes, *dtypes, seed=1)
    tensors = {name: torch.full_like(x, 7.0).to(DEVICE) for name, x in base.items()}
    lift, vector = sketch.whole_gradients.begin_lift(DEVICE), vector_of(sketch)
    assert lift.takes([*tensors.values()])
    held = [x.to(DEVICE) for x in base.values()]
    lift.lift(vector, [*tensors.values()], held)
    assert_lifted(sketch, vector, tensors, base)


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize(
    ("operator", "layout", "out_size"),
    [
        ("affd", "grouped", 700),
        ("affd", "blocked", 2100),
        ("fjl", "blocked", 300),
        pytest.param("afjl", "blocked", 700, marks=pytest.mark.full),
        pytest.param("affd", "grouped", 1, marks=pytest.mark.full),
        pytest.param("afjl", "grouped", 2**12, marks=pytest.mark.full),
    ],
)
def test_long_blocks_are_lifted_to_a_base(operator, layout, out_size, launched):
    """Also those of a vector whose block is shorter, and of a second group of layers.

    Programs lift several units, in the same memory.
    """
    shapes = SHAPES if layout == "grouped" else BLOCKED
    groups = ["y" if name == "b" else "x" for name, _ in shapes]
    sketch = ModelSketch(
        shapes, out_size, layout, seed=3, operator=operator, groups=groups
    )
    base = gradients_of(shapes, FLOAT32, seed=1)
    tensors = {name: torch.full_like(x, 7.0).to(DEVICE) for name, x in base.items()}
    held = [x.to(DEVICE) for x in base.values()]
    vector = vector_of(sketch)
    assert sketch.whole_gradients.lift_onto(vector, held, [*tensors.values()])
    assert "lift_long_blocks" in launched
    assert_lifted(sketch, vector, tensors, base)


@pytest.mark.full
@pytest.mark.parametrize(("operator", "bits"), [("affd", 16), ("fjl", 18)])
def test_the_longest_blocks_are_lifted(operator, bits, launched):
    """Of two and of eight times 2**15 elements."""
    shapes = (("a", (2**bits + 5,)), ("b", (300,)))
    sketch = ModelSketch(shapes, 3000, "blocked", operator=operator)
    vector = vector_of(sketch)
    assert_lifted(sketch, vector, sketch.adjoint(vector))
    assert "lift_long_blocks" in launched


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize("dtypes", [(BFLOAT16,), (FLOAT16, FLOAT32, BFLOAT16)])
def test_lifted_long_blocks_are_rounded_once(dtypes):
    shapes = (("a", (2**16 + 8,)), ("b", (33,)), ("c", (2**15,)))
    sketch = ModelSketch(shapes, 64, "blocked", operator="affd")
    base = gradients_of(shapes, *dtypes, seed=1)
    tensors = {name: torch.full_like(x, 7.0).to(DEVICE) for name, x in base.items()}
    lift, vector = sketch.whole_gradients.begin_lift(DEVICE), vector_of(sketch)
    lift.lift(vector, [*tensors.values()], [x.to(DEVICE) for x in base.values()])
    assert_lifted(sketch, vector, tensors, base)


@pytest.mark.parametrize("layers", [1, 3])
def test_three_launches_lift_to_any_number_of_tensors(layers, launched):
    shapes = [("vector", (2**16,))]
    for layer in range(layers):
        shapes += [(f"{layer}.weight", (16, 18)), (f"{layer}.bias", (18,))]
    sketch = ModelSketch(tuple(shapes), 16, "grouped")
    sketch.adjoint(vector_of(sketch))
    assert launched == ["lift_blocks", "lift_matrices", "spread"]


def test_other_vectors_and_maps_are_lifted_tensor_by_tensor(launched):
    sketch = ModelSketch(SMALL, 16, "grouped")
    wide = sketch.adjoint(vector_of(sketch).double())
    assert wide["a"].dtype == torch.float64
    vector = vector_of(sketch).requires_grad_()
    assert sketch.adjoint(vector)["a"].requires_grad
    normalizer = Normalizer({n: (torch.ones(math.prod(s)),) for n, s in SMALL}, 1)
    for settings in ({"layout": "flat"}, {"normalizer": normalizer}):
        sketch = ModelSketch(SMALL, 16, **{"layout": "grouped", **settings})
        sketch.adjoint(vector_of(sketch))
    assert not launched


def test_a_vector_of_another_length_is_refused(launched):
    sketch = ModelSketch(SMALL, 16, "grouped")
    with pytest.raises(ValueError, match=r"must have 16 elements, got 15 .*pass"):
        sketch.adjoint(torch.ones(15, device=DEVICE))


def test_only_tensors_that_lie_in_one_piece_are_written():
    lift = ModelSketch(SMALL, 64, "grouped").whole_gradients.begin_lift(DEVICE)
    tensors = [torch.zeros(shape, device=DEVICE) for _, shape in SMALL]
    assert lift.takes(tensors)
    assert not lift.takes([tensors[0].T[:, ::2], *tensors[1:]])
    assert not lift.takes([tensors[0].double(), *tensors[1:]])
