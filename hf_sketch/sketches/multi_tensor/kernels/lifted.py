"""Triton kernels that lift a vector of sketch numbers to many tensors.

Each mirrors a kernel that sketches, and reads the same tables. What it lifts is added
to what a tensor of `base` has, and stored once in the tensor of `given`.
"""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.kernels.matrices import hadamard
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
    words,
)

CHUNK = tl.constexpr(1024)


@triton.jit
def spread(
    given_ptr, base_ptr, chunks_ptr, packed_ptr, KIND: tl.constexpr, BASE: tl.constexpr
):
    """Lift small tensors: the reverse of `gather`, from packed vectors.

    Shapes:
        chunks (n, 4), packed: as for `gather`
    """
    row = chunks_ptr + 4 * tl.program_id(0)
    at = tl.arange(0, CHUNK)
    inside = at < tl.load(row + 2)
    x = tl.load(packed_ptr + tl.load(row + 3) + at, inside, 0.0)
    start = tl.load(row + 1)
    add_to(given_ptr, base_ptr, tl.load(row), start + at, inside, x, KIND, BASE, False)


# Keys differ from seed to seed, which must not make Triton compile again.
@triton.jit(do_not_specialize=("before_1", "before_2", "after_1", "after_2"))
def lift_blocks(
    given_ptr,
    base_ptr,
    streams_ptr,
    units_ptr,
    runs_ptr,
    factors_ptr,
    leading_ptr,
    vector_ptr,
    width,
    kept,
    scale,
    before_1,
    before_2,
    after_1,
    after_2,
    LEADING: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Lift the numbers of a segment to its units of LEADING tiles.

    Shapes:
        streams (n, 5), units (n, 2), runs (programs, 5): as for `sum_blocks`
        factors (2, 32, 32), leading (LEADING, LEADING): the last one first
        vector (groups, width), of which a segment has at most `kept` numbers
    """
    runs_ptr += 5 * tl.program_id(0)
    right = tl.permute(read_factor(factors_ptr, 0, LEADING, BFLOAT16), (0, 2, 1))
    left = read_factor(factors_ptr, 1, LEADING, BFLOAT16)
    tile = tl.arange(0, LEADING)
    leading = tl.load(leading_ptr + tile[:, None] * LEADING + tile[None, :])
    leading = leading[:, :, None, None]
    line = tl.arange(0, LEADING * SIDE) * SIDE
    place = tl.arange(0, SIDE)[None, None, None, :]
    at = tl.reshape(line, (1, LEADING, SIDE, 1)) + place
    own = tl.load(runs_ptr + 3) + at % BLOCK
    vector_ptr += tl.load(runs_ptr + 4).to(tl.int64) * width
    numbers = tl.load(vector_ptr + own, (at % BLOCK < kept) & (own < width), 0.0)
    numbers *= scale
    for number in tl.range(tl.load(runs_ptr), tl.load(runs_ptr + 1)):
        keys = streams_ptr + 5 * tl.load(units_ptr + 2 * number)
        start = tl.load(units_ptr + 2 * number + 1).to(tl.int64) * (LEADING * TILE)
        first = table_index(start, tl.load(keys + 3), tl.load(keys + 4), RUN)
        signs = packed_signs(first + line.to(tl.uint32), after_1, after_2)
        x = flip(numbers, tl.reshape(signs, (1, LEADING, SIDE, 1)), place)
        y = rotate(tl.reshape(x, (LEADING, SIDE, SIDE)), right, left, BFLOAT16)
        y = tl.reshape(tl.permute(y, (0, 2, 1)), (LEADING, 1, SIDE, SIDE))
        y = tl.reshape(tl.sum(leading * y, 0), (1, LEADING, SIDE, SIDE))
        first = table_index(start, tl.load(keys + 1), tl.load(keys + 2), RUN)
        signs = packed_signs(first + line.to(tl.uint32), before_1, before_2)
        y = flip(y, tl.reshape(signs, (1, LEADING, SIDE, 1)), place)
        tensor = tl.load(keys)
        add_to(given_ptr, base_ptr, tensor, start + at, at >= 0, y, KIND, BASE, ALIGNED)


@triton.jit
def lift_matrices(
    given_ptr,
    base_ptr,
    matrices_ptr,
    items_ptr,
    runs_ptr,
    orders_ptr,
    vector_ptr,
    width,
    SHAPES: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Rotate numbers back, and unfold them along both sides of parts of matrices.

    Shapes:
        matrices (n, 11), items (n, 5), runs (programs, 7), orders (n, 2, 64): as for
            `sum_matrices`
        vector (groups, width)
    """
    run = runs_ptr + 7 * tl.program_id(0)
    for number in tl.static_range(COUNT):
        if tl.load(run + 2) == number:
            _lift_matrices(
                given_ptr,
                base_ptr,
                matrices_ptr,
                items_ptr,
                run,
                orders_ptr,
                vector_ptr + tl.load(run + 6).to(tl.int64) * width,
                SHAPES[number],
                KIND,
                BASE,
                ALIGNED,
                BFLOAT16,
            )


@triton.jit
def _lift_matrices(
    given_ptr,
    base_ptr,
    matrices_ptr,
    items_ptr,
    run,
    orders_ptr,
    vector_ptr,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Lift the P x Q numbers of a run, of all groups, to AT_ONCE places c at a time."""
    FIRST: tl.constexpr = SHAPE[1]
    P: tl.constexpr = SHAPE[3]
    Q: tl.constexpr = SHAPE[4]
    PADDED: tl.constexpr = SHAPE[7]
    LINES: tl.constexpr = SHAPE[5] * P
    low_p, low_q = tl.load(run + 3), tl.load(run + 4)
    group, line, inner = tl.arange(0, PADDED), tl.arange(0, LINES), tl.arange(0, P * Q)
    inner = (low_p + inner // Q) * SHAPE[2] + low_q + inner % Q
    at = group[:, None] * (FIRST * SHAPE[2]) + inner[None, :]
    inside = (group < SHAPE[6])[:, None] & (inner >= 0)[None, :]
    numbers = tl.load(vector_ptr + at, inside, 0.0) * SHAPE[8]
    for number in tl.range(tl.load(run), tl.load(run + 1)):
        item = items_ptr + 5 * number
        matrix = matrices_ptr + 11 * tl.load(item)
        orders = orders_ptr + 128 * tl.load(matrix + 10) + group
        first = tl.load(orders, group < SHAPE[0], 0)
        second = hadamard(group, tl.load(orders + 64, group < SHAPE[0], 0))
        second = second.to(tl.bfloat16) if BFLOAT16 else second
        for c in tl.range(tl.load(item + 1), tl.load(item + 2), SHAPE[5]):
            x = hadamard(first, c + tl.arange(0, SHAPE[5]))[:, :, None]
            x = tl.reshape(x * numbers[:, None, :], (PADDED, LINES * Q))
            x = tl.reshape(multiply(second, x, LEFT, BFLOAT16), (PADDED, LINES, Q))
            _unfold(
                given_ptr,
                base_ptr,
                matrix,
                item,
                (c + line // P) * FIRST + low_p + line % P,
                low_q,
                tl.reshape(tl.permute(x, (1, 0, 2)), (LINES, PADDED * Q)),
                SHAPE,
                KIND,
                BASE,
                ALIGNED,
            )


@triton.jit
def _unfold(
    given_ptr,
    base_ptr,
    matrix,
    item,
    row,
    low_q,
    x,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store numbers in an item's rows that fold onto those given, and all columns."""
    Q: tl.constexpr = SHAPE[4]
    HEIGHT: tl.constexpr = SHAPE[0] * SHAPE[1]
    WIDTH: tl.constexpr = SHAPE[0] * SHAPE[2]
    tensor, start = tl.load(matrix), tl.load(matrix + 1)
    rows, columns = tl.load(matrix + 2), tl.load(matrix + 3)
    if ALIGNED:
        start, columns = tl.multiple_of(start, 8), tl.multiple_of(columns, 8)
    column = tl.arange(0, SHAPE[7] * Q)
    if SHAPE[2] > Q:
        column = column // Q * SHAPE[2] + column % Q + low_q
    below = row < tl.load(item + 2) * SHAPE[1]
    for fold in tl.range(tl.load(item + 3), tl.load(item + 4)):
        line = row + fold * HEIGHT
        inside = (below & (line < rows))[:, None]
        index = line + tl.load(matrix + 6)
        signs = words(index, tl.load(matrix + 4), tl.load(matrix + 5))[:, None]
        base = start + line.to(tl.int64)[:, None] * columns
        for right in tl.range(0, columns, WIDTH):
            at = (column + right)[None, :]
            mask = inside & (column < WIDTH)[None, :] & (at < columns)
            place = at + tl.load(matrix + 9)
            flips = words(place, tl.load(matrix + 7), tl.load(matrix + 8))
            y = flip(x, signs ^ flips, tl.zeros((1, 1), tl.int32))
            add_to(given_ptr, base_ptr, tensor, base + at, mask, y, KIND, BASE, ALIGNED)
