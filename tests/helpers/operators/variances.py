"""Mean and variance of <S x, S y> over the draw of S, derived from the formulas.

D is the length of the sketch, n that of a block, x_b a block of x; M stands for
|x|^2 |y|^2 + 2 <x, y>^2 - 2 sum_j x_j^2 y_j^2. Every function returns (mean, variance).
"""

import math
from itertools import product

import torch

from tests.helpers.operators.dense import hadamard


def dense(x, y, out):
    """Independent Gaussian entries: <S x, S y> is a mean of D independent products."""
    both, inner, _ = _products(x, y)
    return x @ y, (both + inner) / out


def ffd(x, y, out):
    """Each block on its own keeps sum_k g_k^2 v_k v'_k, v = H x_b, v' = H y_b.

    E g^4 = 3 makes its variance 2 sum_k v_k^2 v'_k^2. The terms of two blocks are
    those of `_across`: the signs B_b leave sum_r E (row r)^2 alone.
    """
    h = hadamard(out)
    v, w = x.view(-1, out) @ h, y.view(-1, out) @ h
    return x @ y, _across(x, y, out) / out + 2 * (v * w).square().sum()


# Hadamard transforms after random signs s. E s_j s_k s_l s_m is 1 where the indices
# agree in pairs. For z = H B x, z' = H B y, H unscaled, and rows a, b with c = a xor b
#
#     E z_a^2 z'_b^2     = |x|^2 |y|^2 + 2 F_c^2 - 2 Q
#     E z_a z'_a z_b z'_b = <x, y>^2 + X_c Y_c + F_c^2 - 2 Q
#
# where F, X, Y are the Walsh transforms of x * y, x^2, y^2, and Q = sum_j x_j^2 y_j^2.
# At c = 0 the first is M. The mean over the kept rows of H_rj H_rk is a product over
# the factors, at j xor k = (c_1, ..., c_k). Of a factor of size m, d random rows are
# kept: a mean of d of m balanced signs, without replacement, with the square
# (m - d) / (d (m - 1)) in expectation if c_i is not 0, and 1 if it is. With permuted
# columns and the first d rows it is 1 if the low bits of a random c_i are 0: the same.


def srht(x, y, out, sizes):
    """The mean over kept rows of z_r z'_r; blocks of prod(sizes), at most D or more."""
    n = math.prod(sizes)
    x, y = x.view(-1, n), y.view(-1, n)
    pairs = _xor_pairs(x**2, y**2) + _xor_pairs(x * y, x * y)
    within = (_collisions(sizes, out) * pairs).sum()
    return (x * y).sum(), _across(x, y, n) / out + within


def afjl(x, y, out, sizes):
    """SRHT with weights g_r^2 of variance 2: 2 E z_r^2 z'_r^2 / D more."""
    mean, variance = srht(x, y, out, sizes)
    return mean, variance + 2 * _fourth(x, y) / out


def affd(x, y, out, sizes):
    """The form sum_ab K_ab g_a g_b with K_ab = P_ab u_a u'_b, P the Gram matrix of H2.

    P has 1 on its diagonal and E P_ab^2 = w_c off it. E g^4 = 3. All blocks have the
    magnitudes of g in common, so that u stands for the signed sum over blocks.
    """
    n = math.prod(sizes)
    both, inner, fourth = _products(x, y)
    blocks, others = x.view(-1, n), y.view(-1, n)
    f = walsh(blocks * others).square().sum(0)
    squares = (walsh(blocks**2) * walsh(others**2)).sum(0)
    off = both + inner + 3 * f + squares - 4 * fourth
    off = (_collisions(sizes, out) * off).sum()
    return x @ y, (_across(x, y, n) + 2 * _fourth(x, y) + off) / n


def fjl(x, y, out, samples, n=None, fourth=None):
    """A mean of D numbers (sum_s gamma_s z_s)(sum_s gamma_s z'_s), alike and, given z,

    independent. Wick's rule for gamma (variance 1 / samples): equal places give the
    mean over a of E z_a^2 z'_a^2 (M, if not given), others E A B + 2 E C^2, where A, B
    and C are the means of z_a^2, z'_a^2 and z_a z'_a. These are |x|^2, |y|^2 and
    <x, y>, but for the terms of two blocks.
    """
    n = n or len(x)
    both, inner, _ = _products(x, y)
    fourth = _fourth(x, y) if fourth is None else fourth
    own = (x * y).view(-1, n).sum(1).square().sum()
    ab, cc = both + 2 * (inner - own) / n, inner + _across(x, y, n) / n
    second = (3 * fourth + (samples - 1) * (ab + 2 * cc)) / samples
    return x @ y, (second - cc) / out + cc - inner


# Kronecker products of d rows of Haar rotations of size m. The expectation of four
# entries Q_ra Q_rb Q_sc Q_sd, summed over the rows r and s, weighs the three pairings
# ab|cd, ac|bd, ad|bc by (_joint); with r = s alone, all by d / (m (m + 2)). A product
# of factors sums these over all pairings of x, y, x, y in each factor.


def qk(x, y, into, out):
    scale = (math.prod(into) / math.prod(out)) ** 2
    second = _over_pairings(x, y, into, list(map(_joint, into, out)))
    return x @ y, scale * second - (x @ y) ** 2


# For factors of signs, index a adding to coordinate r in turn t: 1 where a = b, c = d;
# and, if a and b have the same r, 1 where a = c, b = d and 1 where a = d, b = c. That
# counts a = b = c = d three times. Below are t and r of a, b, c, d in every case.
_FOLDED = ((1, "trtrTRTR"), (1, "trTrtrTr"), (1, "trTrTrtr"), (-2, "trtrtrtr"))


def qk_signs(x, y, into, out):
    """As QK, with those cases in place of pairings; each D_i divides its B_i."""
    sizes = zip(into, out, strict=True)
    shape = [size for b, d in sizes for size in (b // d, d)]
    x, y, second = x.view(shape), y.view(shape), 0.0
    for cases in product(_FOLDED, repeat=len(into)):
        weights, terms = zip(*cases, strict=True)
        a, b, c, d = (
            [4 * i + "trTR".index(s) for i, q in enumerate(terms) for s in q[k : k + 2]]
            for k in (0, 2, 4, 6)
        )
        second += math.prod(weights) * torch.einsum(x, a, y, b, x, c, y, d, [])
    inner = (x * y).sum()
    return inner, second - inner**2


def grouped(x, y, out, sides, widths):
    """Signs pair up the four indices of each side, as monomials that are uncorrelated.

    Coordinates i, i' of one side that have one place within their groups meet, weighed
    by the mean over the kept groups of H[k, u] H[pi k, v], u = c xor c' and v of the
    other side. Two different groups have H of covariance -1 / (r - 1), unless u = 0.
    """
    longest = 2 ** (out - 1).bit_length()
    r = widths[0] * widths[1] // longest
    s = [longest // widths[1], longest // widths[0]]
    kept, off = out // (s[0] * s[1]), 1 / max(1, r - 1)
    square = [  # of the mean, where none, one or both of u, v are not 0
        1 / kept + (1 - 1 / kept) * (-off) ** count for count in range(3)
    ]
    turned, together = [], []
    for length, width, size in zip(sides, widths, s, strict=True):
        place = torch.arange(length) % width
        c, p = place.div(size, rounding_mode="floor"), place % size
        turned.append((c[:, None] != c).long())
        together.append((p[:, None] == p).double())
    weight = torch.tensor(square, dtype=torch.float64)
    both = weight[turned[0][:, :, None, None] + turned[1]]
    both *= together[0][:, :, None, None] * together[1]
    x, y = (z[: sides[0] * sides[1]].view(sides) for z in (x, y))
    terms = torch.einsum("ij,kl->ikjl", x, y)
    terms = terms + terms.transpose(0, 1)
    terms = terms + terms.transpose(2, 3)
    other = [1 - torch.eye(length, dtype=torch.float64) for length in sides]
    # Each monomial comes once for both orders of i, i' and both of j, j'.
    variance = (both * terms.square() * other[0][:, :, None, None] * other[1]).sum() / 4
    for side, products in enumerate((x @ y.T, x.T @ y)):  # j = j', i = i': all of them
        pairs = (products + products.T).square() * other[side] * together[side]
        variance += (weight[turned[side]] * pairs).sum() / 2
    return (x * y).sum(), variance


def afjl_kronecker(x, y, out, sizes):
    """E g_r^2 g_s^2 is 1, and 2 more for r = s."""
    kept = _kept(sizes, out)
    mean, variance = qk(x, y, sizes, kept)
    same = [[d / (m * (m + 2))] * 3 for m, d in zip(sizes, kept, strict=True)]
    scale = (math.prod(sizes) / out) ** 2
    return mean, variance + 2 * scale * _over_pairings(x, y, sizes, same)


def affd_kronecker(x, y, out, sizes):
    """H2 pairs four indices in each factor (p); Wick's rule for g pairs all of them (w)

    at once: where p = w, H1's rows run freely and only the pairing q = w is left, else
    they coincide.
    """
    second = 0.0
    for w in range(3):
        weights = []
        for m, d in zip(sizes, _kept(sizes, out), strict=True):
            joint = _joint(m, d)
            rest = (sum(joint) - joint[w]) / (m + 2)
            weights.append([rest + joint[w] * (q == w) for q in range(3)])
        second += _over_pairings(x, y, sizes, weights)
    return x @ y, (math.prod(sizes) / out) ** 2 * second - (x @ y) ** 2


def fjl_kronecker(x, y, out, samples, sizes):
    same = [[1 / (m + 2)] * 3 for m in sizes]
    fourth = math.prod(sizes) * _over_pairings(x, y, sizes, same)
    return fjl(x, y, out, samples, fourth=fourth)


def walsh(rows):
    """The unscaled Walsh-Hadamard transform of each row, by butterflies."""
    result, half = rows, 1
    while half < rows.shape[1]:
        even, odd = result.reshape(len(rows), -1, 2, half).unbind(2)
        result = torch.stack([even + odd, even - odd], 2)
        half *= 2
    return result.reshape(rows.shape)


def _products(x, y):
    """|x|^2 |y|^2, <x, y>^2 and sum_j x_j^2 y_j^2."""
    return (x @ x) * (y @ y), (x @ y) ** 2, (x * y).square().sum()


def _fourth(x, y):
    """M: E z_a^2 z'_a^2."""
    both, inner, fourth = _products(x, y)
    return both + 2 * inner - 2 * fourth


def _across(x, y, n):
    """Sum over pairs of blocks of |x_b|^2 |y_c|^2 + <x_b, y_b> <x_c, y_c>."""
    x, y = x.reshape(-1, n), y.reshape(-1, n)
    norms, others, inner = (x**2).sum(1), (y**2).sum(1), (x * y).sum(1)
    both = norms.sum() * others.sum() + inner.sum() ** 2
    return both - norms @ others - inner @ inner


def _xor_pairs(v, w):
    """Entry c is sum_j v_j w_(j xor c), over all blocks."""
    return (walsh(walsh(v) * walsh(w)) / v.shape[1]).sum(0)


def _kept(sizes, out):
    """How many rows of each factor the first `out` rows of the product have."""
    after = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [max(1, min(m, out // rest)) for m, rest in zip(sizes, after, strict=True)]


def _collisions(sizes, out):
    """w_c, with w_0 = 0."""
    weights = torch.ones(1, dtype=torch.float64)
    for m, d in zip(sizes, _kept(sizes, out), strict=True):
        factor = torch.full((m,), (m - d) / (d * (m - 1)), dtype=torch.float64)
        factor[0] = 1.0
        weights = torch.kron(weights, factor)
    weights[0] = 0.0
    return weights


def _joint(m, d):
    """Weights of the pairings, summed over d rows r and d rows s."""
    same, rest = d / (m * (m + 2)), d * (d - 1) / (m * (m - 1) * (m + 2))
    return same + rest * (m + 1), same - rest, same - rest


def _over_pairings(x, y, sizes, weights):
    """Sum over pairings q_i in each factor of prod_i weights[i][q_i] X(q)."""
    total = 0.0
    for pairing in product(range(3), repeat=len(sizes)):
        weight = math.prod(w[q] for w, q in zip(weights, pairing, strict=True))
        total += weight * _contract(x, y, sizes, pairing)
    return total


def _contract(x, y, sizes, pairing):
    """X(q): the sum of x_a y_b x_c y_d over indices that are equal in the pairs q."""
    groups = [[i for i, q in enumerate(pairing) if q == kind] for kind in range(3)]
    shape = [math.prod(sizes[i] for i in group) for group in groups]
    order = [axis for group in groups for axis in group]
    x, y = (v.view(sizes).permute(order).reshape(shape) for v in (x, y))
    # The longest of the axes ab|cd, ac|bd, ad|bc is summed first.
    longest = shape.index(max(shape))
    copies = (x, x, y, y) if longest == 1 else (x, y, x, y)
    axes = ((0, 1, 2), (1, 0, 2), (2, 1, 0))[longest]
    a, b, c, d = (v.permute(axes) for v in copies)
    one = torch.einsum("ijk,ilm->jklm", a, b)
    return (one * torch.einsum("ijm,ilk->jklm", c, d)).sum()
