"""Fourth moments of vectors in blocks, of which the variances of sketches are made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch.sketches.operator import fitting, spans
from hf_sketch.sketches.transforms.hadamard import (
    apply_kronecker,
    hadamard_matrix,
    kronecker_sizes,
)


@dataclass(frozen=True, eq=False)
class Moments:
    """Of vectors x that are cut into blocks x_b.

    Shapes:
        whole, between, fourth (b,), transformed (b, block), float64

    Args:
        whole: |x|^4.
        between: sum over b != c of |x_b|^2 |x_c|^2.
        fourth: sum of x_j^4.
        transformed: sum over b of the squares of the unscaled Hadamard transform of
            x_b^2.
    """

    whole: Tensor
    between: Tensor
    fourth: Tensor
    transformed: Tensor


def moments(rows: Tensor, block: int) -> Moments:
    """Return the moments of vectors, with zeros after the last block's end.

    Shapes:
        rows (b, length)
    """
    norm, within, fourth = rows.new_zeros(3, len(rows), dtype=torch.float64)
    transformed = rows.new_zeros(len(rows), block, dtype=torch.float64)
    for low, high in spans(rows.shape[1], fitting(len(rows) * block) * block):
        squares = rows[:, low:high].double().square()
        squares = torch.nn.functional.pad(squares, (0, (low - high) % block))
        squares = squares.view(len(rows), -1, block)
        norms = squares.sum(2)
        norm += norms.sum(1)
        within += norms.square().sum(1)
        fourth += squares.square().sum((1, 2))
        spread = _hadamard(squares.reshape(-1, block)).view_as(squares)
        transformed += spread.square().sum(1)
    whole = norm.square()
    return Moments(whole, whole - within, fourth, transformed)


def of_kept_rows(x: Moments, block: int, out_size: int) -> Tensor:
    """Return the variance of |R H B x|^2, summed over blocks, for random signs B.

    Shapes:
        returns (b,)
    """
    repeated = collisions(block, out_size).to(x.transformed)
    within = _hadamard(x.transformed) / block @ repeated
    return 2 * x.between / out_size + 2 * within


def collisions(block: int, out_size: int) -> Tensor:
    """Return how much rows that are kept of H have in common.

    Entry c is the expected square of the mean over the kept rows of H_rj H_rk, for
    j xor k = c, with 0 for c = 0. The rows are those of a Kronecker product whose
    factors, of m rows, keep d, drawn without replacement: (m - d) / (d (m - 1)).

    Shapes:
        returns (block,), float64
    """
    common = torch.ones(1, dtype=torch.float64)
    rest = block
    for size in kronecker_sizes(block):
        rest //= size
        kept = max(1, min(size, out_size // rest))
        left = (size - kept) / (kept * max(1, size - 1))
        factor = torch.full((size,), left, dtype=torch.float64)
        factor[0] = 1.0
        common = torch.kron(common, factor)
    common[0] = 0.0
    return common


def _hadamard(rows: Tensor) -> Tensor:
    """Apply the unscaled Hadamard transform to each row."""
    factors = [hadamard_matrix(n).to(rows) for n in kronecker_sizes(rows.shape[1])]
    return apply_kronecker(rows, factors)
