"""Triton kernels that copy small tensors, add partial sums up and finish a row."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.reading import read

CHUNK = tl.constexpr(1024)
_ROWS, _COLUMNS = tl.constexpr(64), tl.constexpr(32)  # of partial sums at a time


@triton.jit
def gather(given_ptr, chunks_ptr, packed_ptr, squares_ptr, KIND: tl.constexpr):
    """Copy chunks of at most 1024 elements, and note the sum of each one's squares.

    Shapes:
        chunks (n, 4): the tensor, the first element, how many, and where they go in
            `packed`, or -1
        packed: float32; squares (n,)
    """
    chunk = tl.program_id(0)
    row = chunks_ptr + 4 * chunk
    start, count = tl.load(row + 1), tl.load(row + 2)
    place = tl.load(row + 3)
    at = tl.arange(0, CHUNK)
    x = read(given_ptr, tl.load(row), start + at, at < count, KIND, False)
    tl.store(packed_ptr + place + at, x, mask=at < tl.where(place >= 0, count, 0))
    tl.store(squares_ptr + chunk, tl.sum(x * x))


@triton.jit
def add_rows(
    partial_ptr,
    ranges_ptr,
    squares_ptr,
    count,
    witnesses_ptr,
    before_ptr,
    witness_count,
    row_ptr,
    sums_ptr,
    finite_ptr,
    width,
):
    """Add up the partial sums of each group of layers, and those of squares.

    Program (group, part) adds 32 numbers of a group.

    Shapes:
        partial (rows, width); ranges (groups, 2): rows of each group
        squares (count,); witnesses, before (witness_count,)
        row (groups, width), sums (3,): of all squares, of witnesses and before
        finite (1,): becomes 1
    """
    group, part = tl.program_id(0), tl.program_id(1)
    at = part * _COLUMNS + tl.arange(0, _COLUMNS)[None, :]
    total = tl.zeros((_ROWS, _COLUMNS), tl.float32)
    last = tl.load(ranges_ptr + 2 * group + 1)
    for low in tl.range(tl.load(ranges_ptr + 2 * group), last, _ROWS):
        row = low + tl.arange(0, _ROWS)[:, None]
        mask = (row < last) & (at < width)
        total += tl.load(partial_ptr + row.to(tl.int64) * width + at, mask, 0.0)
    to = part * _COLUMNS + tl.arange(0, _COLUMNS)
    row_ptr += group.to(tl.int64) * width
    tl.store(row_ptr + to, tl.sum(total, 0), mask=to < width)
    if group + part == 0:
        tl.store(sums_ptr, _sum_of(squares_ptr, count))
        tl.store(sums_ptr + 1, _sum_of(witnesses_ptr, witness_count))
        tl.store(sums_ptr + 2, _sum_of(before_ptr, witness_count))
        tl.store(finite_ptr, 1)


@triton.jit
def _sum_of(numbers_ptr, count):
    total = tl.zeros((CHUNK,), tl.float32)
    for low in tl.range(0, count, CHUNK):
        at = low + tl.arange(0, CHUNK)
        total += tl.load(numbers_ptr + at, at < count, 0.0)
    return tl.sum(total)


@triton.jit
def finish_row(
    row_ptr,
    sums_ptr,
    norm_ptr,
    factor_ptr,
    finite_ptr,
    length,
    loss_scale,
    ROUNDING: tl.constexpr,
):
    """Undo the loss scale where clipping has not.

    Shapes:
        row (length,), in place
        sums (3,): as `add_rows` leaves them
        norm, factor (1,): the norm before clipping, and what clipping multiplied by
        finite (1,): 1, which becomes 0 if a number of the row is not finite
    """
    before = tl.sqrt(tl.load(sums_ptr + 2))
    factor = tl.sqrt(tl.load(sums_ptr + 1)) / tl.where(before == 0, 1.0, before)
    same = (before == 0) | (tl.abs(factor - 1) < ROUNDING)
    factor = tl.where(same, 1.0, factor)
    divisor = tl.where(factor != 0, factor, 1.0)
    scaled = tl.abs(tl.log(divisor)) < tl.abs(tl.log(divisor * loss_scale))
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + at, at < length, 0.0) / tl.where(scaled, loss_scale, 1.0)
    tl.store(row_ptr + at, x, mask=at < length)
    if tl.sum((tl.abs(x) < float("inf")).to(tl.int32)) < CHUNK:
        tl.store(finite_ptr, 0)  # all programs that do write the same
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, tl.sqrt(tl.load(sums_ptr)) / divisor / loss_scale)
        tl.store(factor_ptr, tl.where(scaled, factor, factor * loss_scale))
