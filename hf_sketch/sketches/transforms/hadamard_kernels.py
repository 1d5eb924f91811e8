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

from hf_sketch.sketches.transforms.random import LAST_SHIFT, MIX
from hf_sketch.sketches.transforms.signs import RUNS_IN_TABLE

_SHIFT_1, _FACTOR_1 = tl.constexpr(MIX[0][0]), tl.constexpr(MIX[0][1])
_SHIFT_2, _FACTOR_2 = tl.constexpr(MIX[1][0]), tl.constexpr(MIX[1][1])
_SHIFT_3, _FACTOR_3 = tl.constexpr(MIX[2][0]), tl.constexpr(MIX[2][1])
_SHIFT_4 = tl.constexpr(LAST_SHIFT)
_RUNS_IN_TABLE = tl.constexpr(RUNS_IN_TABLE)
_PARTS = tl.constexpr(3)  # of 8 bits each: all of a float32
_LEFT, _RIGHT = tl.constexpr(True), tl.constexpr(False)  # sides of a product
_SIDE = tl.constexpr(32)
_TILE = tl.constexpr(32 * 32)

# Values that differ from stream to stream must not make Triton compile anew.
_PLAIN = (
    "units",
    *(f"before_{key}" for key in ("run_1", "run_2", "1", "2")),
    *(f"after_{key}" for key in ("run_1", "run_2", "1", "2")),
)


@triton.jit
def _mixed(x):
    """The bijection of `CounterRandom`."""
    x = (x ^ (x >> _SHIFT_1)) * _FACTOR_1
    x = (x ^ (x >> _SHIFT_2)) * _FACTOR_2
    x = (x ^ (x >> _SHIFT_3)) * _FACTOR_3
    return x ^ (x >> _SHIFT_4)


@triton.jit
def _words(index, key_1, key_2):
    """`CounterRandom.words` at indices below 2**32, by the generator's keys."""
    x = index.to(tl.uint32) ^ key_1.to(tl.uint32)
    return _mixed(_mixed(x) + key_2.to(tl.uint32))


@triton.jit
def _table_index(coordinate, run_1, run_2, RUN: tl.constexpr):
    """Where the sign of a stream's coordinate lies in the table (`StreamSigns`)."""
    offset = _words(coordinate // RUN, run_1, run_2) & (_RUNS_IN_TABLE * RUN - 1)
    return offset + (coordinate % RUN).to(tl.uint32)


@triton.jit
def _signs(first, key_1, key_2):
    """32 signs of the table in a word, the one at `first` in the lowest bit.

    They lie in two words; the sum over those makes the compiler draw each once in the
    whole program, and not in every thread that needs it.

    Shapes:
        first (n,) -> (n,)
    """
    half = tl.arange(0, 2)[None, :].to(tl.uint32)
    words = _words((first >> 5)[:, None] + half, key_1, key_2)
    bit = (first & 31)[:, None]
    return tl.sum(tl.where(half == 0, words >> bit, (words << 1) << (31 - bit)), 1)


@triton.jit
def _flip(x, signs, place):
    """Flip the signs of x where bit `place` of `signs` is set."""
    mask = (signs << (31 - place).to(tl.uint32)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ mask).to(tl.float32, bitcast=True)


@triton.jit
def _leading_part(x, BFLOAT16: tl.constexpr):
    """X cut to the 8 significant bits of bfloat16, and the rest, both exact."""
    bits = x.to(tl.uint32, bitcast=True)
    rest = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    part = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return part if BFLOAT16 else part.to(tl.float32), rest


@triton.jit
def _multiply(matrix, x, LEFT: tl.constexpr, BFLOAT16: tl.constexpr):
    """Matrix @ x if _LEFT, x @ matrix if _RIGHT, by products in bfloat16.

    They are exact but for the sums in float32.
    """
    y = tl.zeros(x.shape, tl.float32)
    for _ in tl.static_range(_PARTS):
        part, x = _leading_part(x, BFLOAT16)
        y = tl.dot(matrix, part, y) if LEFT else tl.dot(part, matrix, y)
    return y


@triton.jit
def _factor(factors_ptr, number, COPIES: tl.constexpr, BFLOAT16: tl.constexpr):
    """One of the (32, 32) factors, as (COPIES, 32, 32)."""
    row = tl.arange(0, _SIDE)[None, :, None]
    column = tl.arange(0, _SIDE)[None, None, :]
    matrix = tl.load(factors_ptr + number * _TILE + row * _SIDE + column)
    matrix = matrix + tl.zeros((COPIES, _SIDE, _SIDE), tl.float32)
    return matrix.to(tl.bfloat16) if BFLOAT16 else matrix


@triton.jit
def _read_flipped(rows_ptr, low, length, first, key_1, key_2, TILES: tl.constexpr):
    """The coordinates from `low` on with signs from `first` on: (1, TILES, 32, 32).

    Zero outside [0, length).
    """
    row = tl.arange(0, TILES * _SIDE) * _SIDE
    signs = _signs(first + row.to(tl.uint32), key_1, key_2)
    column = tl.arange(0, _SIDE)[None, None, None, :]
    at = low + tl.reshape(row, (1, TILES, _SIDE, 1)) + column
    x = tl.load(rows_ptr + at, mask=(at >= 0) & (at < length), other=0.0)
    return _flip(x.to(tl.float32), tl.reshape(signs, (1, TILES, _SIDE, 1)), column)


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
    right = _factor(factors_ptr, 0, LEADING, BFLOAT16)
    left = tl.permute(_factor(factors_ptr, 1, LEADING, BFLOAT16), (0, 2, 1))
    column = tl.arange(0, LEADING)[None, :]
    leading = tl.load(leading_ptr + tl.arange(0, LEADING)[:, None] * LEADING + column)
    leading = leading[:, :, None, None]
    low, high = 0, units
    if ORDERED:
        low = tl.load(bounds_ptr + segment)
        high = tl.load(bounds_ptr + segment + 1)
    at = tl.arange(0, LEADING * _SIDE) * _SIDE
    place = tl.arange(0, _SIDE)[None, :, None]
    total = tl.zeros((LEADING, _SIDE, _SIDE), tl.float32)
    for number in tl.range(low + split, high, splits, num_stages=2):
        unit = tl.load(order_ptr + number) if ORDERED else number
        coordinate = start + tl.cast(unit, tl.int64) * (LEADING * _TILE)
        first = _table_index(coordinate, before_run_1, before_run_2, RUN)
        x = _read_flipped(
            rows_ptr, coordinate - origin, length, first, before_1, before_2, LEADING
        )
        x = tl.permute(tl.sum(leading * x, 1), (0, 2, 1))
        y = _multiply(left, _multiply(right, x, _LEFT, BFLOAT16), _RIGHT, BFLOAT16)
        first = _table_index(coordinate, after_run_1, after_run_2, RUN)
        signs = _signs(first + at.to(tl.uint32), after_1, after_2)
        total += _flip(y, tl.reshape(signs, (LEADING, 1, _SIDE)), place)
    partial_ptr += ((row.to(tl.int64) * splits + split) * segments + segment) * width
    at = tl.reshape(at, (LEADING, 1, _SIDE)) + place
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
    scratch_ptr += row.to(tl.int64) * units * (TILES * _TILE)
    right = _factor(factors_ptr, 0, TILES, BFLOAT16)
    left = tl.permute(_factor(factors_ptr, 1, TILES, BFLOAT16), (0, 2, 1))
    at = tl.reshape(tl.arange(0, TILES * _SIDE) * _SIDE, (TILES, _SIDE, 1))
    at = at + tl.arange(0, _SIDE)[None, None, :]
    for number in tl.range(split, units, splits, num_stages=2):
        unit = tl.cast(number, tl.int64) * (TILES * _TILE)
        first = _table_index(start + unit, before_run_1, before_run_2, RUN)
        low = start + unit - origin
        x = _read_flipped(rows_ptr, low, length, first, before_1, before_2, TILES)
        x = tl.permute(tl.reshape(x, (TILES, _SIDE, _SIDE)), (0, 2, 1))
        y = _multiply(left, _multiply(right, x, _LEFT, BFLOAT16), _RIGHT, BFLOAT16)
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
    scratch_ptr += row.to(tl.int64) * units * (LEADING * _SIDE * _TILE)
    factor = _factor(factors_ptr, 2, LEADING, BFLOAT16)
    row_of = tl.arange(0, LEADING)[:, None, None] * LEADING
    line = tl.arange(0, LEADING * _SIDE) * _TILE + strip * _SIDE
    place = tl.arange(0, _SIDE)[None, None, :]
    at = tl.reshape(line, (LEADING, _SIDE, 1)) + place
    tile_at = tl.arange(0, _SIDE)[None, :, None] * _TILE + strip * _SIDE + place
    partial_ptr += (row.to(tl.int64) * tl.num_programs(1) + split) * width
    total = tl.load(partial_ptr + at, mask=at < width, other=0.0)
    for number in tl.range(split, units, tl.num_programs(1), num_stages=2):
        unit = tl.cast(number, tl.int64) * (LEADING * _SIDE * _TILE)
        x = tl.zeros((LEADING, _SIDE, _SIDE), tl.float32)
        for tile in tl.static_range(LEADING):
            column = tl.load(leading_ptr + row_of + tile)
            x += column * tl.load(scratch_ptr + unit + tile * _SIDE * _TILE + tile_at)
        y = _multiply(factor, x, _LEFT, BFLOAT16)
        first = _table_index(start + unit, after_run_1, after_run_2, RUN)
        signs = _signs(first + line.to(tl.uint32), after_1, after_2)
        total += _flip(y, tl.reshape(signs, (LEADING, _SIDE, 1)), place)
    tl.store(partial_ptr + at, total, mask=at < width)
