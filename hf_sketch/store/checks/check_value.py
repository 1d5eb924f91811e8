"""Whether this installation computes the map of a store, at a bounded cost."""

from collections.abc import Sequence
from math import isclose, prod
from pathlib import Path
from typing import Final

from hf_sketch.model.sketch import ModelSketch

_TOLERANCE: Final = 1e-4
# One unit is an element of an operator's input: some 16 bytes and 0.15 microseconds.
# The others were measured beside it, as memory of "grouped" and "factored" maps.
_MOST_UNITS: Final = 2**23
_PER_NUMBER, _PER_SHORT_SIDE, _PER_LONG_SIDE = 256, 140, 16


def check_cost(sketch: ModelSketch) -> int:
    """Return about how much computing the check value takes, in units.

    A header of a kilobyte can claim a map of any size. Operators in blocks compute what
    is probed, those of matrices have tables of their sides, and others take all of
    their input.
    """
    if sketch.operator == "dense":
        return sketch.in_size * sketch.out_size
    row = sketch.row_size * _PER_NUMBER
    if sketch.layout == "flat" or sketch.operator in ("ffd", "qk"):
        return max(sketch.in_size, row)
    if sketch.layout == "blocked":
        return row
    matrices = [shape for _, shape in sketch.shapes if len(shape) > 1]
    tables = [_tables(first, prod(others)) for first, *others in matrices]
    return max([row, *tables])


def _tables(rows: int, columns: int) -> int:
    shorter, longer = sorted((rows, columns))
    return shorter * _PER_SHORT_SIDE + longer * _PER_LONG_SIDE


def verify_map(path: Path, sketch: ModelSketch, theirs: Sequence[float]) -> None:
    """Raise if this installation computes another map than a header describes.

    Maps that take more than some 130 MB or 1.3 seconds are not compared.

    Raises:
        ValueError: the check values differ.
    """
    if check_cost(sketch) > _MOST_UNITS:
        return
    ours = sketch.check_value()
    close = {"rel_tol": _TOLERANCE, "abs_tol": _TOLERANCE}
    same = [isclose(a, b, **close) for a, b in zip(ours, theirs, strict=False)]
    if len(ours) != len(theirs) or not all(same):
        raise ValueError(
            f"This installation computes another map than {path} describes: its check "
            f"value is {ours}, the store's {theirs}. Open the store with the hf-sketch "
            "version that wrote it."
        )
