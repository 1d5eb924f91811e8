"""The Triton kernel that adds up blocks that are longer than registers are."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.kernels.reading import read, scaled
from hf_sketch.sketches.transforms.kernel_parts import (
    ALL,
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

_TILES = tl.constexpr(8)  # that a program rotates at a time: 32 numbers per thread


# Keys differ from seed to seed, which must not make Triton compile again.
@triton.jit(do_not_specialize=("before_1", "before_2", "after_1", "after_2"))
def sum_long_blocks(
    given_ptr,
    streams_ptr,
    units_ptr,
    runs_ptr,
    factors_ptr,
    leading_ptr,
    scales_ptr,
    scratch_ptr,
    partial_ptr,
    squares_ptr,
    before_1,
    before_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Add up units of LEADING * 2**15 numbers, flipped, transformed, flipped again.

    A program rotates the tiles of a unit into memory of its own, which stays in the
    cache, and then strips of columns across the tiles. Short blocks are several to a
    unit, with factors that keep them apart.

    Shapes:
        streams (n, 5), units (n, 2): as for `sum_blocks`
        runs (programs, 5): the first unit, one past the last, the row of `partial`,
            and last the sum, by which factors are chosen
        factors (sums, 3, 32, 32), leading (sums, LEADING, LEADING): the last one first
        scales (tensors, 3): what elements are multiplied by, if SCALED; see `scaled`
        scratch (programs, unit), partial (rows, unit), squares (programs,)
    """
    UNIT: tl.constexpr = LEADING * SIDE * TILE
    run = tl.program_id(0)
    runs_ptr += 5 * run
    factors_ptr += tl.load(runs_ptr + 4) * (3 * TILE)
    scratch_ptr += run.to(tl.int64) * UNIT
    squares = tl.zeros((1, _TILES, SIDE, SIDE), tl.float32)
    # One stage: no load of the next unit may overtake what this one stores.
    for number in tl.range(tl.load(runs_ptr), tl.load(runs_ptr + 1), num_stages=1):
        keys = streams_ptr + 5 * tl.load(units_ptr + 2 * number)
        start = tl.load(units_ptr + 2 * number + 1).to(tl.int64) * UNIT
        squares = _rotate_tiles(
            given_ptr,
            keys,
            start,
            scratch_ptr,
            factors_ptr,
            scales_ptr,
            squares,
            before_1,
            before_2,
            LEADING,
            RUN,
            KIND,
            ALIGNED,
            SCALED,
            BFLOAT16,
        )
        _add_strips(
            scratch_ptr,
            partial_ptr + tl.load(runs_ptr + 2).to(tl.int64) * UNIT,
            factors_ptr,
            leading_ptr + tl.load(runs_ptr + 4) * (LEADING * LEADING),
            table_index(start, tl.load(keys + 3), tl.load(keys + 4), RUN),
            number > tl.load(runs_ptr),
            after_1,
            after_2,
            LEADING,
            BFLOAT16,
        )
    tl.store(squares_ptr + run, tl.sum(tl.reshape(squares, (_TILES * TILE,))))


@triton.jit
def _rotate_tiles(
    given_ptr,
    keys,
    start,
    scratch_ptr,
    factors_ptr,
    scales_ptr,
    squares,
    before_1,
    before_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Apply the last two factors to a unit's tiles; return the sums of squares."""
    # bfloat16 (KIND 1) has 8 significant bits, float16 (KIND 2) has 11.
    PARTS: tl.constexpr = ALL if SCALED or KIND == 0 else KIND
    right = read_factor(factors_ptr, 0, _TILES, BFLOAT16)
    left = tl.permute(read_factor(factors_ptr, 1, _TILES, BFLOAT16), (0, 2, 1))
    first = table_index(start, tl.load(keys + 1), tl.load(keys + 2), RUN)
    tl.debug_barrier()  # other threads have read the strips of the unit before
    place = tl.arange(0, SIDE)[None, None, None, :]
    for tile in tl.range(0, LEADING * SIDE, _TILES, num_stages=1):
        line = tile * TILE + tl.arange(0, _TILES * SIDE) * SIDE
        signs = packed_signs(first + line.to(tl.uint32), before_1, before_2)
        at = tl.reshape(line, (1, _TILES, SIDE, 1)) + place
        x = read(given_ptr, tl.load(keys), start + at, at >= 0, KIND, ALIGNED)
        squares += x * x
        if SCALED:
            x = scaled(x, scales_ptr, tl.load(keys), start + at)
        x = flip(x, tl.reshape(signs, (1, _TILES, SIDE, 1)), place)
        y = rotate(tl.reshape(x, (_TILES, SIDE, SIDE)), right, left, BFLOAT16, PARTS)
        to = tl.reshape(at, (_TILES, SIDE, SIDE))
        tl.store(scratch_ptr + to, tl.permute(y, (0, 2, 1)))
    return squares


@triton.jit
def _add_strips(
    scratch_ptr,
    partial_ptr,
    factors_ptr,
    leading_ptr,
    first,
    again,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Apply the other factors to a unit's columns, and add to what is there already.

    Args:
        scratch_ptr: the unit, its tiles rotated.
        partial_ptr: what to add to.
        factors_ptr: (3, 32, 32).
        leading_ptr: (LEADING, LEADING).
        first: place of the unit's first sign in the table.
        again: whether there is anything to add to.
        after_1: the first key of the table.
        after_2: the second.
        LEADING: see `sum_long_blocks`.
        BFLOAT16: see `multiply`.
    """
    factor = read_factor(factors_ptr, 2, LEADING, BFLOAT16)
    tl.debug_barrier()  # other threads have stored tiles
    WORDS: tl.constexpr = _TILES // LEADING  # of 32 columns: a strip
    WIDTH: tl.constexpr = WORDS * SIDE
    column = tl.arange(0, LEADING)
    row = tl.arange(0, LEADING * SIDE) * TILE
    line = tl.arange(0, SIDE)[None, :, None] * TILE + tl.arange(0, WIDTH)[None, None, :]
    place = tl.arange(0, SIDE)[None, None, None, :]
    for strip in tl.range(0, TILE, WIDTH, num_stages=1):
        x = tl.zeros((LEADING, SIDE, WIDTH), tl.float32)
        for tile in tl.static_range(LEADING):
            entries = tl.load(leading_ptr + column * LEADING + tile)[:, None, None]
            x += entries * tl.load(scratch_ptr + tile * SIDE * TILE + strip + line)
        y = multiply(factor, x, LEFT, BFLOAT16)
        word = row[:, None] + strip + tl.arange(0, WORDS)[None, :] * SIDE
        word = tl.reshape(word, (LEADING * SIDE * WORDS,))
        signs = packed_signs(first + word.to(tl.uint32), after_1, after_2)
        signs = tl.reshape(signs, (LEADING, SIDE, WORDS, 1))
        y = flip(tl.reshape(y, (LEADING, SIDE, WORDS, SIDE)), signs, place)
        to = partial_ptr + tl.reshape(word, (LEADING, SIDE, WORDS, 1)) + place
        before = tl.load(to, place < tl.where(again, SIDE, 0), 0.0)
        tl.store(to, before + y)
