"""Rows in fewer bits: what is lost, and that nothing else is."""

import pytest
import torch

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.store.blocks import sketch_matrix
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_STEP, ROW_DTYPES, decode, encode
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import step_row

SIZE = 4096


def normal(rows, size=SIZE, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def scales():
    """Rows from 1e-30 to 1e30."""
    return normal(13) * torch.logspace(-30, 30, 13).unsqueeze(1)


def test_float32_rows_are_kept_as_they_are():
    rows = scales()
    scale, kept = encode([rows], "float32")
    assert torch.equal(decode(scale, kept), rows)


def test_float16_rows_are_rounded_to_11_bits_whatever_their_size():
    rows = scales()
    scale, kept = encode([rows], "float16")
    assert kept.dtype == torch.float16
    error = (decode(scale, kept) - rows).abs()
    # Half a unit in the last place, and of numbers far below the largest 2**-25 of
    # 2**15, the subnormal ones' unit.
    assert (error <= 2**-11 * rows.abs() + 2**-40 * rows.abs().amax(1, True)).all()
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((13,), 0.5))


def test_int8_rows_are_rounded_to_steps_of_the_largest():
    rows = scales()
    scale, kept = encode([rows], "int8")
    assert kept.dtype == torch.int8
    step = rows.abs().amax(1, True) / 127
    error = (decode(scale, kept) - rows).abs()
    assert (error <= step * (0.5 + 1e-5)).all()
    torch.testing.assert_close(scale.unsqueeze(1), step)


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_zero_and_broken_rows_stay_what_they_are(row_dtype):
    rows = normal(4)
    rows[0] = 0.0
    rows[1, 7] = torch.nan
    rows[2, 7] = torch.inf
    got = decode(*encode([rows], row_dtype))
    assert not got[0].any()
    assert got.isfinite().all(1).tolist() == [True, False, False, True]


# Rounding errors of independent rows are all but independent with variance s^2 a
# number: of an inner product of two unit rows they are off by about s sqrt(2).
@pytest.mark.parametrize(
    ("row_dtype", "error"), [("float16", 2**-11 / 3**0.5), ("int8", 0.5 / 3**0.5)]
)
def test_inner_products_are_off_by_what_rounding_explains(row_dtype, error):
    rows = torch.nn.functional.normalize(normal(200), dim=1)
    kept = decode(*encode([rows], row_dtype)).double()
    rows = rows.double()
    pairs = torch.triu_indices(200, 200, offset=1)
    off = (kept @ kept.T - rows @ rows.T)[pairs[0], pairs[1]]
    if row_dtype == "float16":
        # Relative to each number: at most s for numbers of mean square 1 / SIZE.
        bound = error * (2 / SIZE) ** 0.5
    else:
        step = rows.abs().amax(1).mean() / 127
        bound = float(error * step) * 2**0.5
    assert 0.3 * bound < float(off.square().mean().sqrt()) < 1.1 * bound


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [2, 6, 5]], ids=str)
def test_rows_are_rounded_alike_in_however_many_parts_they_come(
    row_dtype, sizes, monkeypatch
):
    rows = scales()
    expected = encode([rows], row_dtype)
    monkeypatch.setattr("hf_sketch.store.rows._PIECE_BYTES", 3 * 4 * SIZE)
    got = encode(rows.split(sizes), row_dtype)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(rows, scales())


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_a_store_gives_back_the_rows_it_can_keep(tmp_path, row_dtype):
    sketch = ModelSketch((("weight", (8, 8)),), 16)
    writer = SketchWriter(tmp_path, Header(sketch, row_dtype=row_dtype))
    rows = normal(5, 16) * 1e-6
    for step, row in enumerate(rows.split(1), start=1):
        writer.append(PER_STEP, step_row(step, sketch=row))
    writer.flush()
    steps = load_sketches(tmp_path).steps
    assert steps.features["sketch"].feature.dtype == row_dtype
    assert ("scale" in steps.column_names) == (row_dtype != "float32")
    assert torch.equal(sketch_matrix(steps), decode(*encode([rows], row_dtype)))


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_groups_of_layers_are_rounded_each_by_its_own_largest(tmp_path, row_dtype):
    shapes = tuple((f"weight.{i}", (8, 8)) for i in range(3))
    sketch = ModelSketch(shapes, 16, groups=("a", "b", "c"))
    writer = SketchWriter(tmp_path, Header(sketch, row_dtype=row_dtype))
    sizes = torch.tensor([1.0, 1e-6, 300.0]).repeat_interleave(16)
    rows = normal(5, 48) * sizes
    rows[3, 17] = torch.inf
    for step, row in enumerate(rows.split(1), start=1):
        writer.append(PER_STEP, step_row(step, sketch=row))
    writer.flush()
    writer.close()
    got = sketch_matrix(load_sketches(tmp_path).steps).view(5, 3, 16)
    expected = torch.stack(
        [decode(*encode([part.clone()], row_dtype)) for part in rows.split(16, 1)], 1
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    broken = got.isfinite().logical_not().any(2)
    assert broken.nonzero().tolist() == [[3, 1]]
    some = [0, 1, 2, 4]
    off = (got - rows.view(5, 3, 16))[some].abs().amax(2)
    unit = {"float32": 0, "float16": 2**-11, "int8": 0.501 / 127}[row_dtype]
    assert (off <= unit * rows.view(5, 3, 16)[some].abs().amax(2)).all()
