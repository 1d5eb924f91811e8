"""Correction of eigenvalues for what a sketch does to them on average."""

import torch
from torch import Tensor

_MOST_GAIN = 10.0


def unbiased_eigenvalues(
    sketched: Tensor,
    multiplicities: Tensor,
    others: Tensor,
    scatter: Tensor,
    push: float,
) -> tuple[Tensor, Tensor]:
    """Estimate H's eigenvalues from those of S @ H @ S.T, with their variances.

    An eigenvalue l of H outside of the bulk appears in the sketch at about
    l + p sum_j l_j / (1 - l_j / l), where p is the variance of <S u, S v> for
    orthogonal u and v: 1 / D for a Gaussian S. The first term of the sum, p tr(H),
    moves all eigenvalues up; the others push large ones away from the rest. Solved for
    l, with the sketch's own eigenvalues s_j, this is

        1 / l = (1 + p sum_j s_j / (s - s_j)) / s

    over all but s itself. A neighbor within the sketch's scatter, s * sqrt(v), pushes
    less than its distance says. The scatter of l grows by the slope of this map.

    Within the bulk, where the slope is steep, only p tr(H) is subtracted.

    Shapes:
        sketched, multiplicities, others, scatter (n,), float64 -> two of (n,)

    Args:
        sketched: Ritz values, ascending.
        multiplicities: how many eigenvalues of the sketch each stands for.
        others: the part of `multiplicities` that one probe estimated.
        scatter: v, the variance of |S u|^2 for the eigenvector u of each.
        push: p.

    Reference:
        Silverstein and Bai 1995, doi:10.1006/jmva.1995.1083; Lawley 1956,
        doi:10.1093/biomet/43.1-2.128, for sample covariances, as S @ H @ S.T is one.
    """
    distances = sketched.unsqueeze(1) - sketched
    squares = distances.square() + (scatter * sketched.square()).unsqueeze(1)
    pushes = (sketched * distances / squares).nan_to_num_().fill_diagonal_(0)
    slopes = squares.reciprocal().nan_to_num_(posinf=0.0).fill_diagonal_(0)
    values = sketched / (1 + push * (pushes @ multiplicities))
    gains = slopes @ (multiplicities * sketched) * push / sketched
    gains = values / sketched + gains * values.square()
    shift = float(multiplicities @ sketched) * push
    bulk = ~(gains < _MOST_GAIN) | ((values > 0) != (sketched > shift))
    probed = variance_of_sum(pushes / sketched.unsqueeze(1), others) * push**2
    variances = scatter * gains * values.square()
    variances += values.square().square() * probed
    shifted = scatter * (sketched - shift).square()
    shifted += variance_of_sum(sketched.unsqueeze(0), others) * push**2
    values = torch.where(bulk, sketched - shift, values)
    return _ascending(values, sketched > shift), torch.where(bulk, shifted, variances)


def variance_of_sum(terms: Tensor, others: Tensor) -> Tensor:
    """Return that of sum_j others_j * terms_ij by one probe: 2 * count * variance."""
    count = float(others.sum())
    if not count:
        return terms.new_zeros(len(terms))
    weights = others / count
    return 2 * count * (terms.square() @ weights - (terms @ weights).square()).clamp(0)


def _ascending(values: Tensor, upper: Tensor) -> Tensor:
    """Put them in order: from both ends inwards, none lies beyond one before it."""
    low, high = values[~upper], values[upper]
    return torch.cat([low.cummax(0).values, high.flip(0).cummin(0).values.flip(0)])
