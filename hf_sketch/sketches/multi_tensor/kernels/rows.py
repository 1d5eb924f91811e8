"""Triton kernels that copy small tensors, add partial sums up and finish a row."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.multi_tensor.kernels.reading import read
from hf_sketch.sketches.transforms.kernel_parts import SIDE, read_factor, rotate

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
    parts_ptr,
    sums_ptr,
    magnitudes_ptr,
    squares_ptr,
    count,
    witnesses_ptr,
    before_ptr,
    witness_count,
    added_ptr,
    norms_ptr,
    finite_ptr,
):
    """Add up the partial sums of each kind and group of layers, and those of squares.

    A program adds 32 numbers of a sum.

    Shapes:
        parts (programs, 2): the sum, and the first of the numbers
        sums (n, 6): where in `partial` its rows begin, how many there are, how far
            apart and of how many numbers, where in `magnitudes` these have factors, or
            -1, and where in `added` it goes
        squares (count,); witnesses, before (witness_count,)
        norms (3,): of all squares, of witnesses and before
        finite (1,): becomes 1
    """
    run = tl.program_id(0)
    sums_ptr += 6 * tl.load(parts_ptr + 2 * run)
    low = tl.load(parts_ptr + 2 * run + 1)
    rows, width = tl.load(sums_ptr + 1), tl.load(sums_ptr + 3)
    at = low + tl.arange(0, _COLUMNS)[None, :]
    from_ptr = partial_ptr + tl.load(sums_ptr) + at
    stride = tl.load(sums_ptr + 2)
    total = tl.zeros((_ROWS, _COLUMNS), tl.float32)
    for first in tl.range(0, rows, _ROWS):
        row = first + tl.arange(0, _ROWS)[:, None]
        mask = (row < rows) & (at < width)
        total += tl.load(from_ptr + row * stride, mask, 0.0)
    to = low + tl.arange(0, _COLUMNS)
    drawn = tl.load(sums_ptr + 4)
    weighed = to < tl.where(drawn >= 0, width, 0)
    factors = tl.load(magnitudes_ptr + drawn + to, weighed, 1.0)
    mask = to < width
    tl.store(added_ptr + tl.load(sums_ptr + 5) + to, tl.sum(total, 0) * factors, mask)
    if run == 0:
        tl.store(norms_ptr, _sum_of(squares_ptr, count))
        tl.store(norms_ptr + 1, _sum_of(witnesses_ptr, witness_count))
        tl.store(norms_ptr + 2, _sum_of(before_ptr, witness_count))
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
    added_ptr,
    terms_ptr,
    ranges_ptr,
    places_ptr,
    weights_ptr,
    factors_ptr,
    norms_ptr,
    row_ptr,
    norm_ptr,
    factor_ptr,
    finite_ptr,
    width,
    loss_scale,
    ROUNDING: tl.constexpr,
    ROTATES: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Make the row of the sums, and undo the loss scale where clipping has not.

    Program (group, part) makes 1024 numbers of a group.

    Shapes:
        added: as `add_rows` leaves it, and norms (3,)
        terms (n, 7), ranges (groups, 2): how sums become numbers; see `_term`
        row (groups, width)
        norm, factor (1,): the norm before clipping, and what clipping multiplied by
        finite (1,): 1, which becomes 0 if a number of the row is not finite
    """
    group, part = tl.program_id(0), tl.program_id(1)
    at = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.zeros((CHUNK,), tl.float32)
    ranges_ptr += 2 * group
    for number in tl.range(tl.load(ranges_ptr), tl.load(ranges_ptr + 1)):
        term = terms_ptr + 7 * number
        y = _term(added_ptr, term, places_ptr, weights_ptr, at)
        if ROTATES:
            factors = tl.load(term + 6)
            if factors >= 0:
                right = read_factor(factors_ptr + factors, 0, 1, BFLOAT16)
                left = read_factor(factors_ptr + factors, 1, 1, BFLOAT16)
                y = tl.reshape(y, (1, SIDE, SIDE))
                y = rotate(y, right, tl.permute(left, (0, 2, 1)), BFLOAT16)
                y = tl.reshape(tl.permute(y, (0, 2, 1)), (CHUNK,))
        x += y
    before = tl.sqrt(tl.load(norms_ptr + 2))
    factor = tl.sqrt(tl.load(norms_ptr + 1)) / tl.where(before == 0, 1.0, before)
    same = (before == 0) | (tl.abs(factor - 1) < ROUNDING)
    factor = tl.where(same, 1.0, factor)
    divisor = tl.where(factor != 0, factor, 1.0)
    scaled = tl.abs(tl.log(divisor)) < tl.abs(tl.log(divisor * loss_scale))
    x /= tl.where(scaled, loss_scale, 1.0)
    x = tl.where(at < width, x, 0.0)
    tl.store(row_ptr + group.to(tl.int64) * width + at, x, mask=at < width)
    if tl.sum((tl.abs(x) < float("inf")).to(tl.int32)) < CHUNK:
        tl.store(finite_ptr, 0)  # all programs that do write the same
    if group + part == 0:
        tl.store(norm_ptr, tl.sqrt(tl.load(norms_ptr)) / divisor / loss_scale)
        tl.store(factor_ptr, tl.where(scaled, factor, factor * loss_scale))


@triton.jit
def _term(added_ptr, term, places_ptr, weights_ptr, at):
    """Numbers of a sketch, as `Finish` has them, before tiles are rotated.

    A term is where in `added` the sum is, how many numbers there are, the stride, the
    samples, where these are in `places` and `weights`, and where in `factors` the
    tiles', or -1.
    """
    stride, samples = tl.load(term + 2), tl.load(term + 3)
    row = at // stride * samples
    places_ptr += tl.load(term + 4) + row
    weights_ptr += tl.load(term + 5) + row
    added_ptr += tl.load(term) + at % stride
    inside = at < tl.load(term + 1)
    y = tl.zeros((CHUNK,), tl.float32)
    for sample in tl.range(0, samples):
        place = tl.load(places_ptr + sample, inside, 0)
        weight = tl.load(weights_ptr + sample, inside, 0.0)
        y += weight * tl.load(added_ptr + place, inside, 0.0)
    return y
