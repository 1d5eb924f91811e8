"""Triton kernels that fold and rotate one side of outer products."""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from hf_sketch.sketches.transforms.kernel_parts import LEFT, flip, multiply

BITS = tl.constexpr(32)  # signs in a word


# Batches differ in their length, which must not make Triton compile again.
@triton.jit(do_not_specialize=("tokens", "words", "kept"))
def turn_sides(
    x_ptr,
    stride,
    tokens,
    length,
    factors_ptr,
    signs_ptr,
    words,
    orders_ptr,
    turned_ptr,
    kept,
    COUNT: tl.constexpr,
    SIDES: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Fold and rotate AT_ONCE vectors of an example, read once, for COUNT sides.

    Shapes:
        x (examples * tokens, length), the first dimension with a stride
        factors (COUNT, length): what coordinates are multiplied by, if SCALED
        signs (COUNT, words): bit i of word j flips coordinate 32 j + i
        orders (COUNT, GROUPS): the rows of the Hadamard matrix
        turned (COUNT, examples, kept, tokens, SIZE)
    """
    WIDTH: tl.constexpr = GROUPS * SIZE
    example, first = tl.program_id(0), tl.program_id(1) * AT_ONCE
    side = tl.arange(0, SIDES)
    token, column = first + tl.arange(0, AT_ONCE), tl.arange(0, PADDED * SIZE)
    line = example.to(tl.int64) * tokens + token
    folded = tl.zeros((SIDES, AT_ONCE, PADDED * SIZE), tl.float32)
    for low in tl.range(0, length, WIDTH):
        at = low + column
        inside = (column < WIDTH) & (at < length)
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + line[:, None] * stride + at[None, :], mask, 0.0)
        mask = (side < COUNT)[:, None] & inside[None, :]
        place = signs_ptr + side[:, None] * words + at[None, :] // BITS
        signs = tl.load(place, mask, 0).to(tl.uint32)[:, None, :]
        x = x.to(tl.float32)[None, :, :]
        if SCALED:
            place = factors_ptr + side[:, None] * length + at[None, :]
            x = x * tl.load(place, mask, 0.0)[:, None, :]
        folded += flip(x, signs, (at % BITS)[None, None, :])
    _rotate(
        folded,
        orders_ptr,
        turned_ptr,
        first,
        tokens,
        kept,
        COUNT,
        SIDES,
        GROUPS,
        PADDED,
        SIZE,
        AT_ONCE,
        BFLOAT16,
    )


# As above.
@triton.jit(do_not_specialize=("tokens", "kept"))
def turn_softmax(
    x_ptr,
    stride,
    tokens,
    length,
    scale,
    chosen_ptr,
    signs_ptr,
    orders_ptr,
    turned_ptr,
    kept,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Fold and rotate softmax(scale * x) minus a one-hot vector, for one side.

    Scores are read once: sums are kept in units of the highest exponential so far.

    Shapes:
        chosen (examples * tokens,): the place of each one-hot vector's 1
        others as for `turn_sides`
    """
    WIDTH: tl.constexpr = GROUPS * SIZE
    example, first = tl.program_id(0), tl.program_id(1) * AT_ONCE
    token, column = first + tl.arange(0, AT_ONCE), tl.arange(0, PADDED * SIZE)
    line = example.to(tl.int64) * tokens + token
    highest = tl.full((AT_ONCE,), float("-inf"), tl.float32)
    total = tl.zeros((AT_ONCE,), tl.float32)
    folded = tl.zeros((AT_ONCE, PADDED * SIZE), tl.float32)
    for low in tl.range(0, length, WIDTH):
        at = low + column
        inside = (column < WIDTH) & (at < length)
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + line[:, None] * stride + at[None, :], mask, 0.0)
        x = tl.where(inside[None, :], x.to(tl.float32) * scale, float("-inf"))
        signs = tl.load(signs_ptr + at // BITS, inside, 0).to(tl.uint32)
        now = tl.maximum(highest, tl.max(x, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        x = tl.exp(x - shift[:, None])
        rest = tl.exp(highest - shift)
        total = total * rest + tl.sum(x, 1)
        folded = folded * rest[:, None] + flip(x, signs[None, :], (at % BITS)[None, :])
        highest = now
    chosen = tl.load(chosen_ptr + line, token < tokens, 0)
    _rotate(
        folded / total[:, None] - _one_hot(chosen, signs_ptr, column, WIDTH),
        orders_ptr,
        turned_ptr,
        first,
        tokens,
        kept,
        1,
        1,
        GROUPS,
        PADDED,
        SIZE,
        AT_ONCE,
        BFLOAT16,
    )


@triton.jit
def _one_hot(chosen, signs_ptr, column, WIDTH: tl.constexpr):
    """Fold one-hot vectors, whose 1 is at `chosen`, to these columns."""
    signs = tl.load(signs_ptr + chosen // BITS).to(tl.uint32)
    one = flip((chosen >= 0).to(tl.float32), signs, chosen % BITS)
    is_chosen = column[None, :] == (chosen % WIDTH)[:, None]
    return tl.where(is_chosen, one[:, None], 0.0)


@triton.jit
def _rotate(
    folded,
    orders_ptr,
    turned_ptr,
    first,
    tokens,
    kept,
    COUNT: tl.constexpr,
    SIDES: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Rotate folded vectors and store them; `first` is the first one's token."""
    example = tl.program_id(0)
    side, group = tl.arange(0, SIDES), tl.arange(0, PADDED)
    x = tl.reshape(folded, (SIDES, AT_ONCE, PADDED, SIZE))
    x = tl.reshape(tl.permute(x, (0, 2, 1, 3)), (SIDES, PADDED, AT_ONCE * SIZE))
    mask = (side < COUNT)[:, None] & (group < GROUPS)[None, :]
    order = tl.load(orders_ptr + side[:, None] * GROUPS + group[None, :], mask, 0)
    matrix = _hadamard(order[:, :, None] & group[None, None, :])
    matrix = matrix.to(tl.bfloat16) if BFLOAT16 else matrix
    turned = multiply(matrix, x, LEFT, BFLOAT16)
    inner = first * SIZE + tl.arange(0, AT_ONCE * SIZE)
    row = side[:, None] * tl.num_programs(0) + example
    row = row.to(tl.int64) * kept + group[None, :]
    to = row[:, :, None] * (tokens * SIZE) + inner[None, None, :]
    mask = ((side < COUNT)[:, None] & (group < kept)[None, :])[:, :, None]
    tl.store(turned_ptr + to, turned, mask & (inner < tokens * SIZE)[None, None, :])


@triton.jit
def _hadamard(bits):
    """Entries of Sylvester's matrix where row and column have these bits in common."""
    bits ^= bits >> 4  # of at most 6
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)
