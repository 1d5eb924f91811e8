"""Means and variances, as in variances.py, with the Hartley transform.

The kept rows c_r = cos - sin start at a random one. Given that, P_jk is the mean over
them of c_rj c_rk; what is kept of |x|^2 is sum_j P_jj x_j^2, and varies, too.
"""

import math
from functools import cache

import torch

from tests.helpers.operators import variances


def afjl(x, y, out):
    """As AFJL, with all rows as likely to be among the D of E z_r^2 z'_r^2."""
    c = hartley(len(x)) * len(x) ** 0.5
    squares, others, products = (c.square() @ v for v in (x**2, y**2, x * y))
    fourth = squares * others + 2 * products**2 - 2 * c**4 @ (x * y).square()
    square, kept, _, _ = _hartley_means(len(x), out)
    form = torch.outer(x**2, y**2) + torch.outer(x * y, x * y)
    form.fill_diagonal_(0)
    spread = (x * y) @ kept @ (x * y) - (x @ y) ** 2
    return x @ y, (square * form).sum() + spread + 2 * fourth.mean() / out


def affd(x, y, out):
    """As AFFD, with all matrices written out: n^3 operations."""
    h = hartley(len(x))
    xx, yy, xy = ((h * v) @ h.T for v in (x**2, y**2, x * y))
    fourth = (h**2 * (x * y) ** 2) @ (h**2).T
    u = torch.outer(xx.diagonal(), yy.diagonal())
    u += torch.outer(xy.diagonal(), xy.diagonal())
    u += 3 * xy**2 + xx * yy - 4 * fourth
    square, _, mixed_square, mixed = _hartley_means(len(x), out)
    form = torch.outer(x**2, y**2) + torch.outer(x * y, x * y)
    given = (mixed_square * form.fill_diagonal_(0)).sum()
    spread = (x * y) @ mixed @ (x * y) - (x @ y) ** 2
    return x @ y, (square * u).sum() + given + spread


@cache
def _hartley_means(n, out):
    """Means over the first row: of P_jk^2, P_jj P_kk, and both of H diag(P) H."""
    h = hartley(n)
    means = torch.zeros(4, n, n, dtype=torch.float64)
    for first in range(n):
        rows = h.roll(-first, 0)[:out]
        p = rows.T @ rows * n / out
        mixed = h.T @ (p.diagonal()[:, None] * h)
        for place, matrix in ((0, p), (2, mixed)):
            means[place] += matrix**2 / n
            means[place + 1] += torch.outer(matrix.diagonal(), matrix.diagonal()) / n
    return means


def fjl(x, y, out, samples):
    """As FJL: the mean over a of c_aj^2 c_al^2 is 1 + [j = l] / 2 - [j = -l] / 2,

    both modulo n / 2.
    """
    half = len(x) // 2
    mirror = -torch.arange(half) % half

    def pairs(v, w):
        v, w = v.view(2, half).sum(0), w.view(2, half).sum(0)
        return v.sum() * w.sum() + v @ w / 2 - v @ w[mirror] / 2

    place = torch.arange(len(x))
    own = 1.5 - 0.5 * (2 * place % half == 0).double()
    fourth = pairs(x**2, y**2) + 2 * pairs(x * y, x * y)
    fourth -= 2 * own @ (x * y).square()
    return variances.fjl(x, y, out, samples, fourth=fourth)


def hartley(size):
    angle = torch.outer(torch.arange(size), torch.arange(size)) % size
    angle = angle.double() * (2 * math.pi / size)
    return (angle.cos() - angle.sin()) / math.sqrt(size)
