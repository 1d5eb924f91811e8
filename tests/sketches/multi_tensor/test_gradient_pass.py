"""Kernels for all tensors at once give the plain sketch, run on the CPU if need be."""

import math

import pytest
import torch

from hf_sketch import ModelSketch
from hf_sketch.model import gradient_pass
from hf_sketch.sketches import by_name
from hf_sketch.sketches.multi_tensor import blocks, division, matrices
from hf_sketch.sketches.multi_tensor.gradient_pass import GradientPass
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

FULL = pytest.mark.full


@pytest.fixture
def little_work_each(monkeypatch):
    """Divides tensors, blocks, folds and groups among as many programs as may be."""
    monkeypatch.setattr(division, "_PROGRAMS", 2**20)
    monkeypatch.setattr(blocks, "_LEAST_ELEMENTS", 7 * 2**10)
    monkeypatch.setattr(matrices, "_LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(matrices, "_NUMBERS", 2)


@pytest.mark.parametrize(
    "sketch",
    [
        ModelSketch(SHAPES, 256, "grouped", seed=3),
        ModelSketch(SHAPES, 700, "grouped"),
        ModelSketch(BLOCKED, 100, "blocked", seed=3),
        ModelSketch(BLOCKED, 2100, "blocked"),
        pytest.param(ModelSketch(SHAPES, 64, "grouped"), marks=pytest.mark.full),
        pytest.param(ModelSketch(SHAPES, 4096, "grouped"), marks=pytest.mark.full),
        pytest.param(ModelSketch(SHAPES, 1, "grouped"), marks=pytest.mark.full),
        pytest.param(ModelSketch(SHAPES, 1024, "blocked"), marks=pytest.mark.full),
    ],
    ids=lambda sketch: f"{sketch.layout} {sketch.out_size}",
)
def test_a_gradient_of_many_tensors_has_the_plain_sketch(sketch):
    assert_plain(sketch, gradients_of(sketch.shapes, FLOAT32))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtypes", [(FLOAT32,), (BFLOAT16,), (FLOAT16, FLOAT32)])
@pytest.mark.parametrize("layout", ["grouped", "blocked"])
@pytest.mark.parametrize("out_size", [700, 2**12, 2**16])
def test_a_device_sketches_large_gradients_as_the_cpu_does(layout, out_size, dtypes):
    shapes = (("table", (5000, 768)), ("w", (768, 3072)), ("b", (768,)), *SHAPES)
    sketch = ModelSketch(shapes, out_size, layout)
    assert_plain(sketch, gradients_of(shapes, *dtypes))


@pytest.mark.usefixtures("little_work_each")
@pytest.mark.parametrize("layout", ["grouped", "blocked"])
def test_work_may_be_divided_among_more_programs(layout):
    shapes = SHAPES[:3] if layout == "grouped" else BLOCKED[1:]
    sketch = ModelSketch(shapes, 256 if layout == "grouped" else 2048, layout)
    assert_plain(sketch, gradients_of(shapes, FLOAT32))


def test_signs_orders_and_segments_are_the_same_bits():
    """Small integers, and scales that are powers of two: no sum is rounded.

    More places are folded at a time than a matrix has.
    """
    sketch = ModelSketch(SHAPES, 16, "grouped", seed=3)
    gradients = {
        name: (10 * x).round().clamp(-8, 8)
        for name, x in gradients_of(SHAPES, FLOAT32).items()
    }
    got = begin(sketch).sketch(given(sketch, gradients))
    assert torch.equal(got.cpu(), sketch.sketch(gradients))


@pytest.mark.parametrize(
    "dtypes",
    [(BFLOAT16,), (FLOAT16,), (BFLOAT16, FLOAT32, FLOAT16)],
    ids=["bfloat16", "float16", "mixed"],
)
def test_short_dtypes_are_read_as_they_are(dtypes):
    shapes = (*SHAPES[:-1], ("vector", (2**16 + 8,)))
    sketch = ModelSketch(shapes, 64, "grouped")
    assert_plain(sketch, gradients_of(shapes, *dtypes))


@pytest.mark.parametrize("dtype", [BFLOAT16, pytest.param(FLOAT16, marks=FULL)])
def test_sums_of_short_numbers_have_all_their_digits(dtype, monkeypatch):
    """Blocks longer than a tile, as none is by default, add tiles up at first."""
    monkeypatch.setattr(by_name, "_ROTATED_BLOCK_SIZE", 2**12)
    sketch = ModelSketch(BLOCKED[1:], 2100, "blocked")
    assert_plain(sketch, gradients_of(sketch.shapes, dtype))


def test_gradients_may_be_missing_move_and_lie_apart():
    """The table of addresses is that of each call."""
    shapes = SHAPES[:-1]
    sketch = ModelSketch(shapes, 64, "grouped")
    kept = begin(sketch)
    first, second = (gradients_of(shapes, FLOAT32, seed=seed) for seed in (1, 2))
    del second["table"], second["bias"]
    second["wide"] = torch.randn(150, 33).T
    second["experts"] = torch.randn(3, 35, 34)[..., 1:]
    for gradients in (first, second, first):
        assert_plain(sketch, gradients, kept.sketch(given(sketch, gradients)))
    inside = torch.randn(33 * 150 + 1)[1:].view(33, 150)  # at no multiple of 16 bytes
    first["wide"] = inside
    assert_plain(sketch, first, kept.sketch(given(sketch, first)))


@pytest.mark.parametrize("operator", ["srht", "affd"])
def test_groups_of_layers_have_sums_of_their_own(operator):
    shapes = (("a.0", (40, 40)), ("a.1", (40,)), ("b.0", (40, 40)), ("b.1", (7,)))
    groups = ("x", "x", "y", "y")
    sketch = ModelSketch(shapes, 64, "grouped", operator=operator, groups=groups)
    gradients = gradients_of(shapes, FLOAT32)
    assert_plain(sketch, gradients)
    gradients = {name: x for name, x in gradients.items() if name[0] == "b"}
    assert not begin(sketch).sketch(given(sketch, gradients))[:64].any()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    plain = GradientPass._launch

    def launch(self, name, *args, **kwargs):
        names.append(name)
        plain(self, name, *args, **kwargs)

    monkeypatch.setattr(GradientPass, "_launch", launch)
    return names


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize(
    ("operator", "layers"),
    [
        ("srht", 1),
        ("srht", 12),
        *((name, layers) for name in ("affd", "afjl", "fjl") for layers in (1, 3)),
    ],
)
def test_five_launches_make_a_row_of_any_number_of_tensors(operator, layers, launched):
    shapes = [("vector", (2**16,))]
    for layer in range(layers):
        shapes += [(f"{layer}.weight", (16, 18)), (f"{layer}.bias", (18,))]
    sketch = ModelSketch(tuple(shapes), 16, "grouped", operator=operator)
    assert len(sketch.operators) == layers + 1
    gradients = given(sketch, gradients_of(shapes, BFLOAT16, FLOAT32))
    kept = begin(sketch, 10)
    kept.note(gradients)
    assert launched == ["gather"]
    launched.clear()
    kept.finish(gradients, 1.0)
    added = "sum_blocks" if operator == "srht" else "sum_long_blocks"
    assert launched == ["gather", added, "sum_matrices", "add_rows", "finish_row"]


SMALL = (("a", (40, 40)), ("b", (40,)), ("c", (3,)))


def finished(change, loss_scale=1.0, scale=1.0):
    """The row of a step whose gradients `change` is applied to after the note."""
    sketch = ModelSketch(SMALL, 64, "grouped")
    kept = begin(sketch, 8, 1e-6)
    gradients = given(sketch, gradients_of(SMALL, FLOAT32))
    scaled = [scale * x for x in gradients]
    kept.note(scaled)
    found = kept.finish([change(x) for x in scaled], loss_scale)
    named = dict(zip(dict(SMALL), gradients, strict=True))
    norm = math.sqrt(sum(x.double().square().sum().item() for x in gradients))
    return found, sketch.sketch({name: x.cpu() for name, x in named.items()}), norm


@pytest.mark.parametrize(
    ("clipped", "unscaled", "loss_scale"),
    [(1, 1, 1), (0.25, 1, 1), (1, 1, 8), (0.25, 1 / 8, 8), (1, 1 / 8, 8), (0, 1, 1)],
)
def test_a_step_says_how_it_was_clipped(clipped, unscaled, loss_scale):
    """Also where the loss's scale was undone in between."""
    change = clipped * unscaled
    found, sketch, norm = finished(lambda x: change * x, loss_scale, loss_scale)
    expected = clipped * sketch
    torch.testing.assert_close(found.row.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert float(found.clip_factor) == pytest.approx(clipped, rel=1e-5)
    if clipped:
        assert float(found.norm) == pytest.approx(norm, rel=1e-5)
    assert bool(found.finite)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_says_so(value):
    def spoil(x):
        spoiled = x.clone()
        spoiled.view(-1)[-1] = value  # no witness in the matrix
        return spoiled

    found, _, _ = finished(spoil)
    assert not found.finite


def test_steps_without_gradients_are_not_clipped():
    found, _, _ = finished(lambda x: x, scale=0.0)
    assert float(found.clip_factor) == 1.0
    assert float(found.norm) == 0.0
    assert not found.row.any()


@pytest.fixture
def with_kernels(monkeypatch):
    """Kernels are launched wherever tensors are: on the CPU interpreted."""
    monkeypatch.setattr(gradient_pass, "can_launch", lambda device: True)


@pytest.mark.usefixtures("with_kernels")
def test_a_map_sketches_whole_gradients_by_kernels(launched):
    sketch = ModelSketch(SMALL, 64, "grouped")
    gradients = gradients_of(SMALL, FLOAT32)
    away = {name: x.to(DEVICE) for name, x in gradients.items() if name != "b"}
    del gradients["b"]
    assert_plain(sketch, gradients, sketch.sketch(away))
    assert launched
    launched.clear()
    with_others = {name: x.double().to(DEVICE) for name, x in away.items()}
    assert sketch.sketch(with_others).dtype == torch.float64
    assert not launched


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "flat"},
        {"layout": "factored"},
        {"operator": "qk"},
        {"operator": "dense"},
    ],
    ids=str,
)
def test_other_maps_are_read_tensor_by_tensor(settings):
    sketch = ModelSketch(SMALL, 16, **{"layout": "grouped", **settings})
    assert not sketch.whole_gradients.can_read(DEVICE)


def test_gradients_of_other_sizes_are_refused():
    sketch = ModelSketch(SMALL, 64, "grouped")
    gradients = given(sketch, gradients_of(SMALL, FLOAT32))
    with pytest.raises(
        ValueError, match=r"must have 40 elements, .*, got 20: pass them"
    ):
        begin(sketch).sketch([gradients[0], gradients[1][:20], gradients[2]])


def test_the_cpu_launches_no_kernel():
    sketch = ModelSketch(SMALL, 64, "grouped")
    assert not sketch.whole_gradients.can_read(torch.device("cpu"))
