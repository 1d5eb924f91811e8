"""A release computes the rows of the release before.

Nine tiny runs are compared with rows that an earlier release recorded of them. What is
counted and not computed must be equal; other numbers may differ by the rounding of
another processor's matrix products.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.trained.golden_rows import GOLDEN, RUNS, train_rows

# Without vector instructions (ATEN_CPU_CAPABILITY=default) rows are off by 5e-6 of
# their norm, and with other numbers of threads by 2e-7.
TOLERANCE = 3e-5
ROUNDED = ("loss", "gradient_norm", "clip_factor", "scale", "sketch")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="dropout draws other numbers"
)
@pytest.mark.parametrize("run", RUNS)
def test_rows_are_those_of_the_release_before(tmp_path, golden, run):
    rows = train_rows(run, tmp_path)
    expected = {
        name.removeprefix(f"{run}/"): column
        for name, column in golden.items()
        if name.startswith(f"{run}/")
    }
    assert rows.keys() == expected.keys()
    for name, column in rows.items():
        if not name.endswith(ROUNDED):
            assert torch.equal(column, expected[name]), name
        elif not name.endswith("sketch"):
            torch.testing.assert_close(
                column, expected[name], rtol=TOLERANCE, atol=0, equal_nan=True
            )
    for kind in ("per_example", "per_step"):
        assert_same_sketches(kind, rows, expected)


def assert_same_sketches(kind, rows, expected):
    """Each number is off by a part of the row's norm, and by its own last place."""
    got, wanted = (kept[f"{kind}/sketch"].double() for kept in (rows, expected))
    within = TOLERANCE * wanted.norm(dim=1, keepdim=True)
    if not rows[f"{kind}/sketch"].is_floating_point():
        within = within + 1.0  # int8 rounds to whole numbers
    elif f"{kind}/scale" in rows:
        within = within + 2**-10 * wanted.abs()  # float16 has 11 bits
    assert ((got - wanted).abs() <= within).all()
