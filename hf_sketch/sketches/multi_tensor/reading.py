"""How Triton kernels read the tensors of a gradient, given by their addresses.

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
