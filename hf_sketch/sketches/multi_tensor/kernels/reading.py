"""How Triton kernels read and write tensors that are given by their addresses.

In the table `given`, (tensors, 3), are the address of each tensor, its number of
elements and its dtype's place in `DTYPES`. A tensor that is missing has no elements.
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
    ALIGNED, addresses are multiples of 16 bytes, and numbers of elements of 8.
    """
    address = tl.load(given_ptr + 3 * tensor)
    elements = tl.load(given_ptr + 3 * tensor + 1)
    if ALIGNED:
        elements = tl.multiple_of(elements, 8)
    if KIND == 0:
        return _of(address, at, mask, elements, tl.float32, ALIGNED)
    if KIND == 1:
        return _of(address, at, mask, elements, tl.bfloat16, ALIGNED)
    if KIND == 2:
        return _of(address, at, mask, elements, tl.float16, ALIGNED)
    kind = tl.load(given_ptr + 3 * tensor + 2)
    none = tl.zeros_like(elements)
    x = _of(address, at, mask, tl.where(kind == 0, elements, none), tl.float32, False)
    x += _of(address, at, mask, tl.where(kind == 1, elements, none), tl.bfloat16, False)
    x += _of(address, at, mask, tl.where(kind == 2, elements, none), tl.float16, False)
    return x


@triton.jit
def _of(address, at, mask, elements, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask & (at < elements), 0.0).to(tl.float32)


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
    """Store base + x in elements of a tensor, rounded once to its dtype.

    KIND is as for `read`, but that packed vectors are in float32. BASE is the same of
    the tensors in `base`, or 4 if there are none.
    """
    if BASE < 4:
        x += read(base_ptr, tensor, at, mask, BASE, ALIGNED)
    address = tl.load(given_ptr + 3 * tensor)
    elements = tl.load(given_ptr + 3 * tensor + 1)
    kind = tl.load(given_ptr + 3 * tensor + 2)
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
