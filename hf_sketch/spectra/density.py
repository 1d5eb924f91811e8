"""Estimates of a spectrum's density and sum, from products with random signs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.curvature.operator import SymmetricOperator, check_dtype, product
from hf_sketch.curvature.vectors import norm_of
from hf_sketch.sketches import CounterRandom
from hf_sketch.sketches.choices import check_count
from hf_sketch.sketches.transforms.signs import flip, sign_masks
from hf_sketch.spectra.basis import Basis
from hf_sketch.spectra.lanczos_run import lanczos

_MARGIN: Final = 6  # widths beyond the outermost nodes: 1e-9 of a bump lies farther out
_POINTS_TO_A_WIDTH: Final = 4
_LEAST_PRODUCTS: Final = 4


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of an operator's eigenvalues, with bumps in their place.

    Shapes:
        grid, density, standard_error (points,), float64, on the CPU

    Args:
        grid: points at which it is known.
        density: its values there; the integral over all eigenvalues is 1.
        standard_error: their errors, from the spread of the probes; nan for one probe.
        width: standard deviation of a bump.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    width: float


@dataclass(frozen=True)
class TraceEstimate:
    """The sum of an operator's eigenvalues.

    Args:
        value: the estimate; unbiased.
        standard_error: its error, from the spread of the random products.
    """

    value: float
    standard_error: float


def spectral_density(
    operator: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 90,
    grid: Tensor | None = None,
    width: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues by stochastic Lanczos quadrature.

    Each probe, a vector of random signs, starts a Lanczos run; its weighted Ritz values
    stand for the whole spectrum. Unbiased, up to the quadrature's error.

    Args:
        operator: anything with `size`, `dtype`, `device` and `operator @ v`.
        probes: number of Lanczos runs; the error falls with its square root.
        steps: Lanczos steps per run, in [1, operator.size].
        grid: float tensor, (points,); by default four points per width, from six
            widths below the spectrum to six above: the trapezoidal rule gives 1 there.
        width: standard deviation of the Gaussian bumps; by default the spectrum's range
            divided by `steps`, the narrowest that hides the single Ritz values: up to
            exp(-8) of its height such a bump is a polynomial of degree 2 steps - 1,
            which the quadrature integrates exactly.
        seed: seed of the probes.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range, or the operator contradicts itself.
        FloatingPointError: a product is not finite.

    Reference:
        Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159, Algorithm 1; differs in the
        default width (their code's, sqrt(1e-5 range) for ranges above 1, shows single
        Ritz values and depends on the unit), and normalizes no grid.
    """
    check_count("probes", probes)
    _check_width(width)
    quadratures: list[tuple[Tensor, Tensor]] = []
    for number in tqdm(range(probes), "Density", unit="probe", disable=not progress):
        probe = _signs(operator, seed, "slq-probe", number)
        run = lanczos(operator, steps, start=probe, progress=False)
        quadratures.append((run.eigenvalues, run.weights))
    return quadrature_density(quadratures, steps, grid, width)


def quadrature_density(
    quadratures: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    grid: Tensor | None = None,
    width: float | None = None,
) -> SpectralDensity:
    """Return the density of which the probes' Ritz values and weights are quadratures.

    Args:
        quadratures: (nodes, weights) of each probe, ascending, the weights' sum 1.
        steps: the longest probe's Lanczos steps.
        grid: see `spectral_density`.
        width: see `spectral_density`.

    Raises:
        ValueError: the width is not above 0.
    """
    _check_width(width)
    low = min(float(nodes[0]) for nodes, _ in quadratures)
    high = max(float(nodes[-1]) for nodes, _ in quadratures)
    # A single eigenvalue has no range: a thousandth of it is visible.
    spread = max(high - low, 1e-3 * abs(low), 1e-3 * abs(high)) or 1.0
    width = spread / steps if width is None else width
    if grid is None:
        low, high = low - _MARGIN * width, high + _MARGIN * width
        points = math.ceil(_POINTS_TO_A_WIDTH * (high - low) / width) + 1
        grid = torch.linspace(low, high, points, dtype=torch.float64)
    grid = grid.detach().cpu().double()
    values = torch.stack(
        [_bumps(grid, nodes, weights, width) for nodes, weights in quadratures]
    )
    error = torch.full_like(grid, math.nan)
    if len(values) > 1:
        error = values.std(0) / len(values) ** 0.5
    return SpectralDensity(grid, values.mean(0), error, width)


def estimate_trace(
    operator: SymmetricOperator,
    *,
    products: int,
    seed: int = 0,
    progress: bool = True,
) -> TraceEstimate:
    """Estimate the trace by Hutch++.

    A third of the products sketch the range, a third compute the trace on it exactly,
    and the rest estimate the remainder by Hutchinson's method. Operators of a rank up
    to a third of `products` have no error: dependent directions of the sketched range
    leave their products to the remainder.

    Args:
        operator: anything with `size`, `dtype`, `device` and `operator @ v`.
        products: number of products, in [4, operator.size]. Memory holds a third of
            that number of vectors.
        seed: seed of the random signs.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range, or the operator contradicts itself.
        FloatingPointError: a product is not finite.

    Reference:
        Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649, Algorithm 1.
    """
    check_dtype(operator)
    if not _LEAST_PRODUCTS <= products <= operator.size:
        raise ValueError(
            f"products must be in [{_LEAST_PRODUCTS}, {operator.size}], at most the "
            f"operator's size, got {products}: pass a number in between."
        )
    basis = Basis.empty(products // 3, operator)
    with tqdm(
        total=products, desc="Trace", unit="product", disable=not progress
    ) as bar:
        multiply = _Products(operator, bar)
        rank = _fill_range(multiply, basis, seed)
        within = [float(row.dot(multiply(row))) for row in basis.rows[:rank]]
        beyond: list[float] = []
        for number in range(products - multiply.count):
            probe = _signs(operator, seed, "trace-probe", number)
            basis.orthogonalise(rank, probe)
            beyond.append(float(probe.dot(multiply(probe))))
    return TraceEstimate(
        math.fsum(within) + statistics.fmean(beyond),
        statistics.stdev(beyond) / len(beyond) ** 0.5,
    )


def _bumps(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    """Sum Gaussian bumps at the nodes, with the weights as areas."""
    heights = ((grid[:, None] - nodes) / width).square().mul(-0.5).exp()
    return heights @ weights / (width * math.sqrt(2 * math.pi))


def _check_width(width: float | None) -> None:
    if width is not None and not width > 0:
        raise ValueError(f"width must be above 0, got {width}: pass None or a width.")


class _Products:
    """Products with an operator, counted, shown, and checked to be finite."""

    def __init__(self, operator: SymmetricOperator, bar: "tqdm[Any]") -> None:
        self.operator = operator
        self.count = 0
        self._bar = bar

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        result = product(self.operator, vector)
        bad = int((~result.isfinite()).sum())
        if bad:
            raise FloatingPointError(
                f"Product {self.count} has {bad} of {len(result)} elements that are "
                "not finite. Correct the operator."
            )
        self._bar.update()
        return result


def _fill_range(multiply: _Products, basis: Basis, seed: int) -> int:
    """Orthonormalize products with random signs; return how many are independent."""
    rank, largest = 0, 0.0
    for number in range(len(basis.rows)):
        vector = multiply(_signs(multiply.operator, seed, "trace-sketch", number))
        largest = max(largest, norm_of([vector]))
        basis.orthogonalise(rank, vector)
        norm = norm_of([vector])
        if norm > torch.finfo(vector.dtype).eps ** 0.75 * largest:
            basis.rows[rank].copy_(vector / norm)
            rank += 1
    return rank


def _signs(operator: SymmetricOperator, seed: int, role: str, number: int) -> Tensor:
    """Return the probe of this number: random signs, (size,)."""
    size = operator.size
    masks = sign_masks(CounterRandom(seed, role), number * size, size)
    signs = flip(torch.ones(size, dtype=torch.float32), masks)
    return signs.to(operator.dtype).to(operator.device)
