"""What examples contribute to a step's gradient, and how noisy that gradient is."""

import torch
from torch import Tensor


def step_shares(rows: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """Return each example's share of a step's gradient.

    The share of row r with weight w is w <r, g> / |g|^2, where g is the gradient before
    clipping. It is negative for an example that pulls the other way. Where g is the
    weighted sum of the rows, the shares add up to 1; they are 0 where g is 0.

    Shapes:
        rows (n, out_size), weights (n,), gradient (out_size,) -> (n,)

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        >>> weights = torch.full((3,), 1 / 3)
        >>> step_shares(rows, weights, weights @ rows)
        tensor([0.4000, 0.2000, 0.4000])
    """
    square = gradient.square().sum()
    shares = weights.to(rows) * (rows @ gradient.to(rows))
    return shares / torch.where(square > 0, square, torch.inf)


def noise_and_signal(
    rows: Tensor, weights: Tensor, gradient: Tensor, examples: int
) -> tuple[Tensor, Tensor]:
    """Return unbiased estimates of tr(Sigma) and |G|^2 from one step.

    Sigma is the covariance of a single example's gradient and G its mean over all
    examples. Their ratio is the simple noise scale: the batch size at which noise and
    signal of a step are equally large. Take the ratio of means over several steps, not
    the mean of ratios.

    With B examples per step and contributions c = B w r, whose mean is the gradient g,

        tr(Sigma) = (mean |c|^2 - |g|^2) B / (B - 1),  |G|^2 = |g|^2 - tr(Sigma) / B.

    Shapes:
        rows (n, out_size), weights (n,), gradient (out_size,) -> (), ()

    Args:
        rows: rows of the step's examples, or of some of them.
        weights: weights of these examples in the step.
        gradient: the step's gradient, before clipping.
        examples: B, at least 2; the number of examples in the whole step.

    Reference:
        McCandlish et al. 2018, arXiv:1812.06162, eq. (2.9) and appendix A.1, with
        batches of 1 and of B examples.
    """
    contributed = rows.square().sum(1) * (examples * weights.to(rows)).square()
    square = gradient.to(rows).square().sum()
    noise = (contributed.mean() - square) * (examples / (examples - 1))
    return noise, square - noise / examples
