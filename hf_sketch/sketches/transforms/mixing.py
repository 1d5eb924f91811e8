"""Orthogonal transforms that spread a vector's energy over all coordinates."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.hadamard import (
    LARGEST_FACTOR,
    apply_kronecker,
    hadamard_matrix,
    kronecker_sizes,
    leading_rows,
)
from hf_sketch.sketches.transforms.random import CounterRandom

Mix = Literal["hadamard", "fft", "kronecker"]
MIXES: tuple[Mix, ...] = get_args(Mix)
Permuted = Literal["rows", "columns", "none"]

# Unscaled: the transform's matrix divided by sqrt(n) is orthogonal. A number stands for
# the FFT, and is its first row.
Mixing = Sequence[Tensor] | int


def mixing(
    mix: Mix, size: int, seed: int, permuted: Permuted, cut: bool = False
) -> Mixing:
    """The factors of an unscaled n x n transform, on the CPU; a number for the FFT.

    "hadamard": Kronecker product of small Hadamard matrices with permuted rows or
    columns. "kronecker": of Haar rotations. "fft": the discrete Hartley transform, real
    plus imaginary part of the FFT, which is real, symmetric and orthogonal. Its entries
    differ in size: where the results are to be `cut`, its rows start at a random one
    and go round, so that every entry is as likely to be kept.
    """
    if mix == "fft":
        first = CounterRandom(seed, f"first-row-{permuted}").words(0, 1)
        return int(first) % size if cut else 0
    factors: list[Tensor] = []
    for axis, n in enumerate(kronecker_sizes(size)):
        if mix == "kronecker":
            rng = CounterRandom(seed, f"rotation-{permuted}/{axis}")
            factors.append(haar_columns(n, n, rng).T.to(torch.float64) * n**0.5)
            continue
        order = CounterRandom(seed, f"{permuted}/{axis}").permutation(n)
        matrix = hadamard_matrix(n)
        if permuted == "rows":
            matrix = matrix[order]
        elif permuted == "columns":
            matrix = matrix[:, order]
        factors.append(matrix.contiguous())
    return factors


def square_factors(
    transform: Mixing, count: int, leading: int = 1
) -> tuple[Tensor, Tensor]:
    """The last factors, all of one size, and the product of those before them.

    Short transforms are several next to each other, each of its own part of a vector.

    Args:
        transform: factors of at most 32 rows, as `mixing` gives them.
        count: how many of the last ones.
        leading: the least size of the product.

    Shapes:
        returns (count, 32, 32), the last factor first, and (n, n)
    """
    assert not isinstance(transform, int)
    given, one = list(transform), torch.ones(1, 1)
    square: list[Tensor] = []
    for _ in range(count):
        factor = given.pop() if given else one
        square.append(_beside(factor, LARGEST_FACTOR))
    rest = one
    for factor in given:
        rest = torch.kron(rest, factor)
    return torch.stack(square), _beside(rest, leading)


def _beside(factor: Tensor, size: int) -> Tensor:
    """Return a block-diagonal matrix of at least `size` rows."""
    return torch.kron(torch.eye(max(1, size // len(factor))), factor)


def haar_columns(size: int, count: int, rng: CounterRandom) -> Tensor:
    """Orthonormal columns with the Haar distribution.

    The columns of a QR decomposition get the signs of R's diagonal, which makes it Haar
    up to the sign of the determinant; no inner product sees that one.

    Shapes:
        returns (size, count), float32, on the CPU; count <= size
    """
    gaussian = rng.normals(0, size * count).to(torch.float64).view(size, count)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(torch.float32)


def mix_rows(
    rows: Tensor, transform: Mixing, keep: int, scratch: Tensor | None = None
) -> Tensor:
    """Transform each row and keep the first `keep` results.

    `scratch` is as for `apply_kronecker`.

    Shapes:
        rows (b, n) -> (b, keep)
    """
    if isinstance(transform, int):
        return _hartley(rows).roll(-transform, 1)[:, :keep]
    factors = [factor.to(rows) for factor in leading_rows(transform, keep)]
    return apply_kronecker(rows, factors, scratch)[:, :keep]


def mix_adjoint(rows: Tensor, transform: Mixing, size: int) -> Tensor:
    """The transpose of `mix_rows`.

    Shapes:
        rows (b, keep) -> (b, size)
    """
    if isinstance(transform, int):
        padded = torch.nn.functional.pad(rows, (0, size - rows.shape[1]))
        return _hartley(padded.roll(transform, 1))
    factors = [f.to(rows).T for f in leading_rows(transform, rows.shape[1])]
    kept = torch.Size(f.shape[1] for f in factors).numel()
    padded = torch.nn.functional.pad(rows, (0, kept - rows.shape[1]))
    return apply_kronecker(padded, factors)


def _hartley(rows: Tensor) -> Tensor:
    """Real plus imaginary part of the discrete Fourier transform, unscaled."""
    spectrum = torch.fft.fft(rows)
    return spectrum.real + spectrum.imag
