"""The Triton kernel that lifts blocks too long for a program's registers."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.kernels.reading import add_to
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

_TILES = tl.constexpr(8)  # that a program rotates at a time: 32 numbers per thread


# Keys differ from seed to seed, which must not make Triton compile again.
@triton.jit(do_not_specialize=("before_1", "before_2", "after_1", "after_2"))
def lift_long_blocks(
    given_ptr,
    base_ptr,
    streams_ptr,
    units_ptr,
    runs_ptr,
    factors_ptr,
    leading_ptr,
    scratch_ptr,
    mixed_ptr,
    before_1,
    before_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Lift the numbers of a sum to its units of LEADING * 2**15 elements.

    The reverse of `sum_long_blocks`: strips of columns first, then tiles.

    Shapes:
        streams (n, 5), units (n, 2), runs (programs, 5), factors (sums, 3, 32, 32),
            leading (sums, LEADING, LEADING), scratch (programs, unit): as there
        mixed (sums, unit): the same numbers for each block of a unit
    """
    UNIT: tl.constexpr = LEADING * SIDE * TILE
    run = tl.program_id(0)
    runs_ptr += 5 * run
    factors_ptr += tl.load(runs_ptr + 4) * (3 * TILE)
    leading_ptr += tl.load(runs_ptr + 4) * (LEADING * LEADING)
    mixed_ptr += tl.load(runs_ptr + 4).to(tl.int64) * UNIT
    scratch_ptr += run.to(tl.int64) * UNIT
    # One stage: no load of the next unit may overtake what this one stores.
    for number in tl.range(tl.load(runs_ptr), tl.load(runs_ptr + 1), num_stages=1):
        keys = streams_ptr + 5 * tl.load(units_ptr + 2 * number)
        start = tl.load(units_ptr + 2 * number + 1).to(tl.int64) * UNIT
        _rotate_strips(
            mixed_ptr,
            scratch_ptr,
            factors_ptr,
            leading_ptr,
            table_index(start, tl.load(keys + 3), tl.load(keys + 4), RUN),
            after_1,
            after_2,
            LEADING,
            BFLOAT16,
        )
        _store_tiles(
            given_ptr,
            base_ptr,
            keys,
            start,
            scratch_ptr,
            factors_ptr,
            before_1,
            before_2,
            LEADING,
            RUN,
            KIND,
            BASE,
            ALIGNED,
            BFLOAT16,
        )


@triton.jit
def _rotate_strips(
    mixed_ptr,
    scratch_ptr,
    factors_ptr,
    leading_ptr,
    first,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Flip a unit's numbers, and apply all but the last two factors to its columns.

    Args:
        mixed_ptr: the unit.
        scratch_ptr: where it goes.
        factors_ptr: (3, 32, 32).
        leading_ptr: (LEADING, LEADING).
        first: place of the unit's first sign in the table.
        after_1: the first key of the table.
        after_2: the second.
        LEADING: see `lift_long_blocks`.
        BFLOAT16: see `multiply`.
    """
    factor = tl.permute(read_factor(factors_ptr, 2, LEADING, BFLOAT16), (0, 2, 1))
    tl.debug_barrier()  # other threads have read the tiles of the unit before
    WORDS: tl.constexpr = _TILES // LEADING  # of 32 columns: a strip
    WIDTH: tl.constexpr = WORDS * SIDE
    row = tl.arange(0, LEADING * SIDE) * TILE
    line = tl.arange(0, SIDE)[:, None] * TILE + tl.arange(0, WIDTH)[None, :]
    column = tl.arange(0, LEADING) * LEADING
    place = tl.arange(0, SIDE)[None, None, None, :]
    for strip in tl.range(0, TILE, WIDTH, num_stages=1):
        word = row[:, None] + strip + tl.arange(0, WORDS)[None, :] * SIDE
        word = tl.reshape(word, (LEADING * SIDE * WORDS,))
        signs = packed_signs(first + word.to(tl.uint32), after_1, after_2)
        signs = tl.reshape(signs, (LEADING, SIDE, WORDS, 1))
        at = tl.reshape(word, (LEADING, SIDE, WORDS, 1)) + place
        x = flip(tl.load(mixed_ptr + at), signs, place)
        x = multiply(factor, tl.reshape(x, (LEADING, SIDE, WIDTH)), LEFT, BFLOAT16)
        for tile in tl.static_range(LEADING):
            entries = tl.load(leading_ptr + column + tile)[:, None, None]
            y = tl.sum(entries * x, 0)
            tl.store(scratch_ptr + tile * SIDE * TILE + strip + line, y)


@triton.jit
def _store_tiles(
    given_ptr,
    base_ptr,
    keys,
    start,
    scratch_ptr,
    factors_ptr,
    before_1,
    before_2,
    LEADING: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Apply the last two factors to a unit's tiles, and store them in their tensor."""
    right = tl.permute(read_factor(factors_ptr, 0, _TILES, BFLOAT16), (0, 2, 1))
    left = read_factor(factors_ptr, 1, _TILES, BFLOAT16)
    first = table_index(start, tl.load(keys + 1), tl.load(keys + 2), RUN)
    tl.debug_barrier()  # other threads have stored strips
    tensor, place = tl.load(keys), tl.arange(0, SIDE)[None, None, None, :]
    for tile in tl.range(0, LEADING * SIDE, _TILES, num_stages=1):
        line = tile * TILE + tl.arange(0, _TILES * SIDE) * SIDE
        signs = packed_signs(first + line.to(tl.uint32), before_1, before_2)
        at = tl.reshape(line, (1, _TILES, SIDE, 1)) + place
        x = tl.load(scratch_ptr + tl.reshape(at, (_TILES, SIDE, SIDE)))
        y = tl.permute(rotate(x, right, left, BFLOAT16), (0, 2, 1))
        y = tl.reshape(y, (1, _TILES, SIDE, SIDE))
        y = flip(y, tl.reshape(signs, (1, _TILES, SIDE, 1)), place)
        add_to(given_ptr, base_ptr, tensor, start + at, at >= 0, y, KIND, BASE, ALIGNED)
