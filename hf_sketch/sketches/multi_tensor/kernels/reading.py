"""How Triton kernels read and write tensors that are given by their addresses.

The table `given`, (tensors, 4), has each tensor's address, the first element that is
there, one past the last, and the dtype's place in `DTYPES`. The address is that of
element 0, even if a shard has only later ones. A tensor that is missing has none.
"""

# Triton is not installed everywhere, and its language has no types.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def read(given_ptr, tensor, at, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a tensor as float32, zero where there are none.

    KIND is the place of the dtype that all tensors have, or 3 if they differ. If
    ALIGNED, addresses are multiples of 16 bytes, and the ends of tensors of 8 elements.
    """
    row = given_ptr + 4 * tensor
    address, first, end = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:
        first, end = tl.multiple_of(first, 8), tl.multiple_of(end, 8)
    mask &= (at >= first) & (at < end)
    if KIND == 0:
        return _of(address, at, mask, tl.float32, ALIGNED)
    if KIND == 1:
        return _of(address, at, mask, tl.bfloat16, ALIGNED)
    if KIND == 2:
        return _of(address, at, mask, tl.float16, ALIGNED)
    kind = tl.load(row + 3)
    x = _of(address, at, mask & (at < tl.where(kind == 0, end, 0)), tl.float32, False)
    x += _of(address, at, mask & (at < tl.where(kind == 1, end, 0)), tl.bfloat16, False)
    x += _of(address, at, mask & (at < tl.where(kind == 2, end, 0)), tl.float16, False)
    return x


@triton.jit
def _of(address, at, mask, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask, 0.0).to(tl.float32)


@triton.jit
def factors(scales_ptr, tensor, side):
    """Where the factors of a tensor's rows are, or those of its columns (side 1).

    In the table `scales`, (tensors, 3), are the addresses of both, float32, and the
    number of columns.
    """
    return tl.load(scales_ptr + 3 * tensor + side).to(tl.pointer_type(tl.float32))


@triton.jit
def scaled(x, scales_ptr, tensor, at):
    """Elements of a tensor times the factors of their rows and columns."""
    place, width = at.to(tl.uint32), tl.load(scales_ptr + 3 * tensor + 2).to(tl.uint32)
    line = place // width
    column = place - line * width
    there = x != 0  # not behind the last element
    x *= tl.load(factors(scales_ptr, tensor, 0) + line, there, 0.0)
    return x * tl.load(factors(scales_ptr, tensor, 1) + column, there, 0.0)


@triton.jit
def add_to(
    given_ptr,
    base_ptr,
    tensor,
    at,
    mask,
    x,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store base + x in elements of a whole tensor, rounded once to its dtype.

    KIND is as for `read`, but that packed vectors are in float32. BASE is the same of
    the tensors in `base`, or 4 if there are none.
    """
    if BASE < 4:
        x += read(base_ptr, tensor, at, mask, BASE, ALIGNED)
    row = given_ptr + 4 * tensor
    address, elements, kind = tl.load(row), tl.load(row + 2), tl.load(row + 3)
    if ALIGNED:
        elements = tl.multiple_of(elements, 8)
    if kind == 0:
        _to(address, at, mask, elements, x, tl.float32, ALIGNED)
    if KIND == 1 or KIND == 3:  # noqa: SIM102  (a branch of the program below)
        if kind == 1:
            _to(address, at, mask, elements, x, tl.bfloat16, ALIGNED)
    if KIND > 1:  # noqa: SIM102
        if kind == 2:
            _to(address, at, mask, elements, x, tl.float16, ALIGNED)


@triton.jit
def _to(address, at, mask, elements, x, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, x.to(dtype), mask & (at < elements))
