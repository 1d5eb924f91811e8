"""The variance of a mean whose terms are crossed: they share rows and columns."""

import math
from collections.abc import Sequence
from itertools import product

from torch import Tensor


def variance_of_mean(arrays: Tensor, left: Sequence[float]) -> Tensor:
    """Estimate the variance of each array's mean over the draw of its indices.

    Each axis's indices are drawn on their own, without replacement, and `left` is the
    part of the population that was not drawn. With the mean squares MS_A of the
    interactions of the axes in A, as in an analysis of variance, the estimate

        sum over sets A of axes, not empty, of (-1)^(|A| + 1) left_A MS_A / size

    is unbiased for up to two axes, with left_A the product of `left` over A. An axis of
    length 1 shows no variance.

    Shapes:
        arrays (b, D_1, ..., D_k) -> (b,)

    Reference:
        Cornfield and Tukey 1956, doi:10.1214/aoms/1177728067.
    """
    total = arrays.new_zeros(len(arrays))
    for chosen in product((False, True), repeat=len(left)):
        effect, copies, freedom, weight = arrays, 1, 1, -1.0
        for axis, (inside, part) in enumerate(zip(chosen, left, strict=True), start=1):
            mean = effect.mean(axis, keepdim=True)
            if inside:
                freedom *= effect.shape[axis] - 1
                weight *= -part
                effect = effect - mean
            else:
                copies *= effect.shape[axis]
                effect = mean
        if any(chosen) and freedom:
            squares = effect.flatten(1).square().sum(1)
            total += weight * copies / freedom * squares
    return (total / math.prod(arrays.shape[1:])).clamp(0)
