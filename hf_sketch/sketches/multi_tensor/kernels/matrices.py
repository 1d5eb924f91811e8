"""The Triton kernel that folds and rotates many matrices."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.kernels.reading import factors, read
from hf_sketch.sketches.transforms.kernel_parts import (
    LEFT,
    flip,
    multiply,
    words,
)


@triton.jit
def sum_matrices(
    given_ptr,
    matrices_ptr,
    items_ptr,
    runs_ptr,
    orders_ptr,
    scales_ptr,
    partial_ptr,
    squares_ptr,
    width,
    SHAPES: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Fold parts of matrices along both sides, and rotate them, as `Grouped` does.

    Shapes:
        matrices (n, 11): the tensor, the first element, rows, columns, for each side
            the keys of its signs and the index of the first, and the place in `orders`
        items (n, 5): the matrix, and ranges of its places c and of folds of its rows
        runs (programs, 7): the first item, one past the last, which of SHAPES its
            matrices have, the first p and q, the row of `partial`, and the group
        orders (n, 2, 64): by side, the rows of the Hadamard matrix
        scales (tensors, 3): what elements are multiplied by, if SCALED; see `scaled`
        partial (rows, width), squares (programs,)
    """
    run = runs_ptr + 7 * tl.program_id(0)
    for number in tl.static_range(COUNT):
        if tl.load(run + 2) == number:
            squares = _sum_matrices(
                given_ptr,
                matrices_ptr,
                items_ptr,
                run,
                orders_ptr,
                scales_ptr,
                partial_ptr + tl.load(run + 5).to(tl.int64) * width,
                SHAPES[number],
                KIND,
                ALIGNED,
                SCALED,
                BFLOAT16,
            )
            tl.store(squares_ptr + tl.program_id(0), squares)


@triton.jit
def _sum_matrices(
    given_ptr,
    matrices_ptr,
    items_ptr,
    run,
    orders_ptr,
    scales_ptr,
    partial_ptr,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Sum the P x Q numbers of a run, of all groups, AT_ONCE places c at a time."""
    P: tl.constexpr = SHAPE[3]
    Q: tl.constexpr = SHAPE[4]
    AT_ONCE: tl.constexpr = SHAPE[5]
    PADDED: tl.constexpr = SHAPE[7]
    low_p, low_q = tl.load(run + 3), tl.load(run + 4)
    group, line = tl.arange(0, PADDED), tl.arange(0, AT_ONCE * P)
    total = tl.zeros((PADDED, P * Q), tl.float32)
    squares = tl.zeros((AT_ONCE * P, PADDED * Q), tl.float32)
    for number in tl.range(tl.load(run), tl.load(run + 1)):
        item = items_ptr + 5 * number
        matrix = matrices_ptr + 11 * tl.load(item)
        orders = orders_ptr + 128 * tl.load(matrix + 10)
        first, second = _rotations(orders, group, SHAPE[0], BFLOAT16)
        for c in tl.range(tl.load(item + 1), tl.load(item + 2), AT_ONCE):
            row = (c + line // P) * SHAPE[1] + low_p + line % P
            x, squared = _fold(
                given_ptr,
                matrix,
                item,
                scales_ptr,
                row,
                low_q,
                SHAPE,
                KIND,
                ALIGNED,
                SCALED,
            )
            squares += squared
            x = tl.permute(tl.reshape(x, (AT_ONCE * P, PADDED, Q)), (1, 0, 2))
            x = tl.reshape(x, (PADDED, AT_ONCE * P * Q))
            turned = multiply(second, x, LEFT, BFLOAT16)
            turned = tl.reshape(turned, (PADDED, AT_ONCE, P * Q))
            entries = hadamard(first, c + tl.arange(0, AT_ONCE))
            total += tl.sum(turned * entries[:, :, None], 1)
    inner = tl.arange(0, P * Q)
    inner = (low_p + inner // Q) * SHAPE[2] + low_q + inner % Q
    to = group[:, None] * (SHAPE[1] * SHAPE[2]) + inner[None, :]
    inside = (group < SHAPE[6])[:, None] & (inner >= 0)[None, :]
    tl.store(partial_ptr + to, total * SHAPE[8], mask=inside)
    return tl.sum(squares)


@triton.jit
def _rotations(orders_ptr, group, GROUPS: tl.constexpr, BFLOAT16: tl.constexpr):
    """The rows that groups of the first side have, and the second side's matrix."""
    first = tl.load(orders_ptr + group, group < GROUPS, 0)
    second = hadamard(tl.load(orders_ptr + 64 + group, group < GROUPS, 0), group)
    return first, second.to(tl.bfloat16) if BFLOAT16 else second


@triton.jit
def _fold(
    given_ptr,
    matrix,
    item,
    scales_ptr,
    row,
    low_q,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Fold an item's rows onto those given, and all columns; with the squares."""
    Q: tl.constexpr = SHAPE[4]
    NUMBERS: tl.constexpr = SHAPE[7] * Q
    HEIGHT: tl.constexpr = SHAPE[0] * SHAPE[1]
    WIDTH: tl.constexpr = SHAPE[0] * SHAPE[2]
    tensor, start = tl.load(matrix), tl.load(matrix + 1)
    rows, columns = tl.load(matrix + 2), tl.load(matrix + 3)
    if ALIGNED:
        start, columns = tl.multiple_of(start, 8), tl.multiple_of(columns, 8)
    column = tl.arange(0, NUMBERS)
    if SHAPE[2] > Q:
        column = column // Q * SHAPE[2] + column % Q + low_q
    below = row < tl.load(item + 2) * SHAPE[1]
    x = tl.zeros((row.shape[0], NUMBERS), tl.float32)
    squares = tl.zeros((row.shape[0], NUMBERS), tl.float32)
    for fold in tl.range(tl.load(item + 3), tl.load(item + 4)):
        line = row + fold * HEIGHT
        inside = (below & (line < rows))[:, None]
        index = line + tl.load(matrix + 6)
        if SCALED:
            scale = tl.load(
                factors(scales_ptr, tensor, 0) + index[:, None], inside, 0.0
            )
        signs = words(index, tl.load(matrix + 4), tl.load(matrix + 5))[:, None]
        base = start + line.to(tl.int64)[:, None] * columns
        for right in tl.range(0, columns, WIDTH):
            at = (column + right)[None, :]
            mask = inside & (column < WIDTH)[None, :] & (at < columns)
            y = read(given_ptr, tensor, base + at, mask, KIND, ALIGNED)
            squares += y * y
            if SCALED:
                of_column = factors(scales_ptr, tensor, 1) + at
                y *= scale * tl.load(of_column, at < columns, 0.0)
            place = at + tl.load(matrix + 9)
            flips = words(place, tl.load(matrix + 7), tl.load(matrix + 8))
            x += flip(y, signs ^ flips, tl.zeros((1, 1), tl.int32))
    return x, squares


@triton.jit
def hadamard(row, column):
    """Entries of Sylvester's Hadamard matrix: (n,), (m,) -> (n, m)."""
    bits = row[:, None] & column[None, :]  # of at most 6
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)
