"""Walsh-Hadamard transforms as Kronecker products of small dense factors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy

LARGEST_FACTOR = 32


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, unscaled: entries are +1 and -1.

    Shapes:
        returns (size, size), float32; size is a power of two.
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]
        )
    return matrix


def kronecker_sizes(size: int, largest: int = LARGEST_FACTOR) -> tuple[int, ...]:
    """Split a power of two into factors of at most `largest`, the odd one first.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Listing 1.
    """
    sizes: list[int] = []
    while size > 1:
        sizes.append(min(size, largest))
        size //= sizes[-1]
    return tuple(reversed(sizes)) or (1,)


def apply_kronecker(
    rows: Tensor, factors: Sequence[Tensor], scratch: Tensor | None = None
) -> Tensor:
    """Multiply each row by factors[0] (x) factors[1] (x) ... (row-major).

    Memory that is asked of the system again for each product costs more than the
    product; a caller with many small batches gives its own.

    Args:
        rows: (b, n_1 * ... * n_k).
        factors: factors[i] is (m_i, n_i).
        scratch: as many elements as `rows`, and no factor grows them; then it and
            `rows` are overwritten, and the result lies in one of them.

    Returns:
        (b, m_1 * ... * m_k)
    """
    batch = before = len(rows)
    after = math.prod(factor.shape[1] for factor in factors)
    buffers: list[Tensor] = []
    if scratch is not None and not is_lazy(rows):
        buffers = [scratch.view(-1), rows.view(-1)]
    for number, factor in enumerate(factors):
        height, width = factor.shape
        after //= width
        rest = (after,) if after > 1 else ()
        x, out = rows.reshape(before, width, *rest), None
        if buffers:
            size = before * height * after
            out = buffers[number % 2][:size].view(before, height, *rest)
        if not rest:
            rows = torch.mm(x, factor.T, out=out)
        elif before == 1 and out is None:
            rows = factor @ x[0]
        else:
            rows = torch.matmul(factor, x, out=out)
        before *= height
    return rows.reshape(batch, before // max(batch, 1))


def leading_rows(factors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Factors whose Kronecker product starts with the first `count` rows of the whole.

    Only rows that a prefix of `count` needs are kept, so its cost shrinks with it.
    """
    kept: list[Tensor] = []
    after = math.prod(factor.shape[0] for factor in factors)
    for factor in factors:
        after //= factor.shape[0]
        rows = min(factor.shape[0], math.ceil(count / after))
        kept.append(factor[:rows])
        if rows > 1:
            count = rows * after * factor.shape[0]
    return kept
