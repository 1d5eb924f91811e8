"""Triton kernels that flip, transform and add blocks while they read them once.

A tile is 1024 consecutive coordinates, seen as a (32, 32) matrix X; a transform by the
Kronecker product of two factors is then left @ X @ right.T.
"""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from hf_sketch.sketches.transforms.kernel_parts import (
    LEFT,
    SIDE,
    TILE,
    flip,
    multiply,
    packed_signs,
    read_factor,
    rotate,
    table_index,
)

# Values that differ from stream to stream must not make Triton compile again.
_PLAIN = (
    "units",
    *(f"before_{key}" for key in ("run_1", "run_2", "1", "2")),
    *(f"after_{key}" for key in ("run_1", "run_2", "1", "2")),
)


@triton.jit
def _read_flipped(rows_ptr, low, length, first, key_1, key_2, TILES: tl.constexpr):
    """The coordinates from `low` on with signs from `first` on: (1, TILES, 32, 32).

    Zero outside [0, length).
    """
    row = tl.arange(0, TILES * SIDE) * SIDE
    signs = packed_signs(first + row.to(tl.uint32), key_1, key_2)
    column = tl.arange(0, SIDE)[None, None, None, :]
    at = low + tl.reshape(row, (1, TILES, SIDE, 1)) + column
    x = tl.load(rows_ptr + at, mask=(at >= 0) & (at < length), other=0.0)
    return flip(x.to(tl.float32), tl.reshape(signs, (1, TILES, SIDE, 1)), column)


@triton.jit(do_not_specialize=_PLAIN)
def sum_whole(
    rows_ptr,
    partial_ptr,
    factors_ptr,
    leading_ptr,
    order_ptr,
    bounds_ptr,
    stride,
    length,
    origin,
    start,
    units,
    width,
    before_run_1,
    before_run_2,
    before_1,
    before_2,
    after_run_1,
    after_run_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    ORDERED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Add up units of LEADING tiles, each flipped, transformed and flipped again.

    Program (row, split, segment) adds every `splits`-th unit of a segment.

    Shapes:
        rows (b, length) with `stride`: the coordinates from `origin` on; the first of
            the `units` units starts at coordinate `start`
        factors (2, 32, 32), leading (LEADING, LEADING): the last one first
        order: if ORDERED, the units by segment; bounds (segments + 1,): their ranges
        partial (b, splits, segments, width)
    """
    row, split, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, segments = tl.num_programs(1), tl.num_programs(2)
    rows_ptr += row.to(tl.int64) * stride
    right = read_factor(factors_ptr, 0, LEADING, BFLOAT16)
    left = tl.permute(read_factor(factors_ptr, 1, LEADING, BFLOAT16), (0, 2, 1))
    column = tl.arange(0, LEADING)[None, :]
    leading = tl.load(leading_ptr + tl.arange(0, LEADING)[:, None] * LEADING + column)
    leading = leading[:, :, None, None]
    low, high = 0, units
    if ORDERED:
        low = tl.load(bounds_ptr + segment)
        high = tl.load(bounds_ptr + segment + 1)
    at = tl.arange(0, LEADING * SIDE) * SIDE
    place = tl.arange(0, SIDE)[None, :, None]
    total = tl.zeros((LEADING, SIDE, SIDE), tl.float32)
    for number in tl.range(low + split, high, splits, num_stages=2):
        unit = tl.load(order_ptr + number) if ORDERED else number
        coordinate = start + tl.cast(unit, tl.int64) * (LEADING * TILE)
        first = table_index(coordinate, before_run_1, before_run_2, RUN)
        x = _read_flipped(
            rows_ptr, coordinate - origin, length, first, before_1, before_2, LEADING
        )
        y = rotate(tl.sum(leading * x, 1), right, left, BFLOAT16)
        first = table_index(coordinate, after_run_1, after_run_2, RUN)
        signs = packed_signs(first + at.to(tl.uint32), after_1, after_2)
        total += flip(y, tl.reshape(signs, (LEADING, 1, SIDE)), place)
    partial_ptr += ((row.to(tl.int64) * splits + split) * segments + segment) * width
    at = tl.reshape(at, (LEADING, 1, SIDE)) + place
    tl.store(partial_ptr + at, total, mask=at < width)


@triton.jit(do_not_specialize=_PLAIN)
def rotate_tiles(
    rows_ptr,
    scratch_ptr,
    factors_ptr,
    stride,
    length,
    origin,
    start,
    units,
    before_run_1,
    before_run_2,
    before_1,
    before_2,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Flip, and transform by the last two factors, `units` times TILES tiles of a row.

    Shapes:
        rows (b, length) as for `sum_whole`
        scratch (b, units * TILES * 1024)
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows_ptr += row.to(tl.int64) * stride
    scratch_ptr += row.to(tl.int64) * units * (TILES * TILE)
    right = read_factor(factors_ptr, 0, TILES, BFLOAT16)
    left = tl.permute(read_factor(factors_ptr, 1, TILES, BFLOAT16), (0, 2, 1))
    at = tl.reshape(tl.arange(0, TILES * SIDE) * SIDE, (TILES, SIDE, 1))
    at = at + tl.arange(0, SIDE)[None, None, :]
    for number in tl.range(split, units, splits, num_stages=2):
        unit = tl.cast(number, tl.int64) * (TILES * TILE)
        first = table_index(start + unit, before_run_1, before_run_2, RUN)
        low = start + unit - origin
        x = _read_flipped(rows_ptr, low, length, first, before_1, before_2, TILES)
        x = tl.reshape(x, (TILES, SIDE, SIDE))
        y = rotate(x, right, left, BFLOAT16)
        tl.store(scratch_ptr + unit + at, tl.permute(y, (0, 2, 1)))


@triton.jit(do_not_specialize=_PLAIN)
def sum_strips(
    scratch_ptr,
    partial_ptr,
    factors_ptr,
    leading_ptr,
    start,
    units,
    width,
    after_run_1,
    after_run_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Finish what `rotate_tiles` began, 32 columns at a time, and add the units up.

    Program (row, split, strip) adds to what its part of `partial` holds.

    Shapes:
        scratch (b, units, LEADING * 32, 1024)
        factors (3, 32, 32), leading (LEADING, LEADING): the last one first
        partial (b, splits, width)
    """
    row, split, strip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    scratch_ptr += row.to(tl.int64) * units * (LEADING * SIDE * TILE)
    factor = read_factor(factors_ptr, 2, LEADING, BFLOAT16)
    row_of = tl.arange(0, LEADING)[:, None, None] * LEADING
    line = tl.arange(0, LEADING * SIDE) * TILE + strip * SIDE
    place = tl.arange(0, SIDE)[None, None, :]
    at = tl.reshape(line, (LEADING, SIDE, 1)) + place
    tile_at = tl.arange(0, SIDE)[None, :, None] * TILE + strip * SIDE + place
    partial_ptr += (row.to(tl.int64) * tl.num_programs(1) + split) * width
    total = tl.load(partial_ptr + at, mask=at < width, other=0.0)
    for number in tl.range(split, units, tl.num_programs(1), num_stages=2):
        unit = tl.cast(number, tl.int64) * (LEADING * SIDE * TILE)
        x = tl.zeros((LEADING, SIDE, SIDE), tl.float32)
        for tile in tl.static_range(LEADING):
            column = tl.load(leading_ptr + row_of + tile)
            x += column * tl.load(scratch_ptr + unit + tile * SIDE * TILE + tile_at)
        y = multiply(factor, x, LEFT, BFLOAT16)
        first = table_index(start + unit, after_run_1, after_run_2, RUN)
        signs = packed_signs(first + line.to(tl.uint32), after_1, after_2)
        total += flip(y, tl.reshape(signs, (LEADING, SIDE, 1)), place)
    tl.store(partial_ptr + at, total, mask=at < width)
