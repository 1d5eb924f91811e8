"""What Triton kernels have in common: random words, signs, exact products."""

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
ALL = tl.constexpr(3)  # parts of 8 bits: a float32 has no more
LEFT, RIGHT = tl.constexpr(True), tl.constexpr(False)  # sides of a product
SIDE = tl.constexpr(32)
TILE = tl.constexpr(32 * 32)


@triton.jit
def mixed(x):
    """The bijection of `CounterRandom`."""
    x = (x ^ (x >> _SHIFT_1)) * _FACTOR_1
    x = (x ^ (x >> _SHIFT_2)) * _FACTOR_2
    x = (x ^ (x >> _SHIFT_3)) * _FACTOR_3
    return x ^ (x >> _SHIFT_4)


@triton.jit
def words(index, key_1, key_2):
    """`CounterRandom.words` at indices below 2**32, by the generator's keys."""
    x = index.to(tl.uint32) ^ key_1.to(tl.uint32)
    return mixed(mixed(x) + key_2.to(tl.uint32))


@triton.jit
def table_index(coordinate, run_1, run_2, RUN: tl.constexpr):
    """Where the sign of a stream's coordinate lies in the table (`StreamSigns`)."""
    offset = words(coordinate // RUN, run_1, run_2) & (_RUNS_IN_TABLE * RUN - 1)
    return offset + (coordinate % RUN).to(tl.uint32)


@triton.jit
def packed_signs(first, key_1, key_2):
    """32 signs of the table in a word, the one at `first` in the lowest bit.

    They lie in two words; the sum over those makes the compiler draw each once in the
    whole program, and not in every thread that needs it.

    Shapes:
        first (n,) -> (n,)
    """
    half = tl.arange(0, 2)[None, :].to(tl.uint32)
    pair = words((first >> 5)[:, None] + half, key_1, key_2)
    bit = (first & 31)[:, None]
    return tl.sum(tl.where(half == 0, pair >> bit, (pair << 1) << (31 - bit)), 1)


@triton.jit
def flip(x, signs, place):
    """Flip the signs of x where bit `place` of `signs` is set."""
    mask = (signs << (31 - place).to(tl.uint32)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ mask).to(tl.float32, bitcast=True)


@triton.jit
def leading_part(x, BFLOAT16: tl.constexpr):
    """X cut to the 8 significant bits of bfloat16, and the rest, both exact."""
    bits = x.to(tl.uint32, bitcast=True)
    rest = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    part = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return part if BFLOAT16 else part.to(tl.float32), rest


@triton.jit
def multiply(
    matrix, x, LEFT: tl.constexpr, BFLOAT16: tl.constexpr, PARTS: tl.constexpr = ALL
):
    """Matrix @ x if LEFT, x @ matrix if RIGHT, by products in bfloat16.

    They are exact but for the sums in float32, if x has 8 * PARTS significant bits.
    """
    y = tl.zeros(x.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        part, x = leading_part(x, BFLOAT16)
        y = tl.dot(matrix, part, y) if LEFT else tl.dot(part, matrix, y)
    return y


@triton.jit
def read_factor(factors_ptr, number, COPIES: tl.constexpr, BFLOAT16: tl.constexpr):
    """One of the (32, 32) factors, as (COPIES, 32, 32)."""
    row = tl.arange(0, SIDE)[None, :, None]
    column = tl.arange(0, SIDE)[None, None, :]
    matrix = tl.load(factors_ptr + number * TILE + row * SIDE + column)
    matrix = matrix + tl.zeros((COPIES, SIDE, SIDE), tl.float32)
    return matrix.to(tl.bfloat16) if BFLOAT16 else matrix


@triton.jit
def rotate(x, right, left, BFLOAT16: tl.constexpr, PARTS: tl.constexpr = ALL):
    """Tiles times the last two factors: (n, rows, columns) -> (n, columns, rows).

    `left` is transposed, and x has 8 * PARTS significant bits.
    """
    y = multiply(right, tl.permute(x, (0, 2, 1)), LEFT, BFLOAT16, PARTS)
    return multiply(left, y, RIGHT, BFLOAT16)
