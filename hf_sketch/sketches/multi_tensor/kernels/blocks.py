"""The Triton kernel that adds up the blocks of many tensors."""

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
    SIDE,
    TILE,
    flip,
    packed_signs,
    read_factor,
    rotate,
    table_index,
)


# Keys differ from seed to seed, which must not make Triton compile again.
@triton.jit(do_not_specialize=("before_1", "before_2", "after_1", "after_2"))
def sum_blocks(
    given_ptr,
    streams_ptr,
    units_ptr,
    runs_ptr,
    factors_ptr,
    leading_ptr,
    scales_ptr,
    partial_ptr,
    squares_ptr,
    width,
    scale,
    before_1,
    before_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    FOLDS: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Add up units of LEADING tiles, each flipped, transformed and flipped again.

    Shapes:
        streams (n, 5): the tensor, and the keys of its signs' runs, before and after
        units (n, 2): the stream and the unit's place in it
        runs (programs, 5): the first unit, one past the last, the row of `partial`, the
            first number there, and the group
        factors (2, 32, 32), leading (LEADING, LEADING): the last one first
        scales (tensors, 3): what elements are multiplied by, if SCALED; see `scaled`
        partial (rows, width), squares (programs,)
    """
    # bfloat16 (KIND 1) has 8 significant bits, float16 (KIND 2) has 11.
    PARTS: tl.constexpr = ALL if LEADING > 1 or SCALED or KIND == 0 else KIND
    run = tl.program_id(0)
    right = read_factor(factors_ptr, 0, LEADING, BFLOAT16)
    left = tl.permute(read_factor(factors_ptr, 1, LEADING, BFLOAT16), (0, 2, 1))
    at = tl.arange(0, LEADING * SIDE) * SIDE
    tile = tl.arange(0, LEADING)
    leading = tl.load(leading_ptr + tile[:, None] * LEADING + tile[None, :])
    leading = leading[:, :, None, None]
    place = tl.arange(0, SIDE)
    total = tl.zeros((LEADING, SIDE, SIDE), tl.float32)
    squares = tl.zeros((1, LEADING, SIDE, SIDE), tl.float32)
    runs_ptr += 5 * run
    for number in tl.range(tl.load(runs_ptr), tl.load(runs_ptr + 1)):
        keys = streams_ptr + 5 * tl.load(units_ptr + 2 * number)
        start = tl.load(units_ptr + 2 * number + 1).to(tl.int64) * (LEADING * TILE)
        first = table_index(start, tl.load(keys + 1), tl.load(keys + 2), RUN)
        signs = packed_signs(first + at.to(tl.uint32), before_1, before_2)
        where = tl.reshape(at, (1, LEADING, SIDE, 1)) + place[None, None, None, :]
        x = read(given_ptr, tl.load(keys), start + where, where >= 0, KIND, ALIGNED)
        squares += x * x
        if SCALED:
            x = scaled(x, scales_ptr, tl.load(keys), start + where)
        signs = tl.reshape(signs, (1, LEADING, SIDE, 1))
        x = flip(x, signs, place[None, None, None, :])
        x = tl.sum(leading * x, 1) if LEADING > 1 else tl.reshape(x, total.shape)
        y = rotate(x, right, left, BFLOAT16, PARTS)
        first = table_index(start, tl.load(keys + 3), tl.load(keys + 4), RUN)
        signs = packed_signs(first + at.to(tl.uint32), after_1, after_2)
        total += flip(y, tl.reshape(signs, (LEADING, 1, SIDE)), place[None, :, None])
    LENGTH: tl.constexpr = LEADING * TILE // FOLDS
    mixed = tl.reshape(tl.permute(total, (0, 2, 1)), (FOLDS, LENGTH))
    to = tl.load(runs_ptr + 3) + tl.arange(0, LENGTH)
    partial_ptr += tl.load(runs_ptr + 2).to(tl.int64) * width
    tl.store(partial_ptr + to, tl.sum(mixed, 0) * scale, mask=to < width)
    tl.store(squares_ptr + run, tl.sum(tl.reshape(squares, (LEADING * TILE,))))
