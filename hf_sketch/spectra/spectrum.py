"""The spectrum of a sketched Hessian: eigenvalues, their errors, their meaning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hf_sketch.curvature.check import CurvatureCheck
from hf_sketch.curvature.vectors import norm_of
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.choices import check_count, check_setting
from hf_sketch.spectra.bias import unbiased_eigenvalues, variance_of_sum
from hf_sketch.spectra.density import (
    SpectralDensity,
    TraceEstimate,
    quadrature_density,
)
from hf_sketch.spectra.lanczos_run import LanczosResult, lanczos
from hf_sketch.spectra.scatter import cross_variance, scatter_of
from hf_sketch.spectra.sketched_hessian import SketchedHessian

_OUTLIER_RATIO = 0.2
_CONVERGED = 1e-2
_MEASURED = 5  # as many eigenvalues as the callback logs


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of S @ H @ S.T, and what they say about H.

    A sketch moves all eigenvalues up by about `shift` = tr(H) / out_size, pushes the
    large ones further out and scatters each of them, a Gaussian one by a relative
    sqrt(2 / out_size). `eigenvalues` undo the first two; all statistics use them.

    Shapes:
        sketched, residuals, weights, gradient_along, scatter (krylov_dim,), float64, in
            ascending order of `sketched`
        vectors (kept, out_size), float32; vector_places (kept,), int64

    Args:
        model_sketch: S.
        step: the optimizer step, 0 before the first.
        loss: the mean loss at the parameters.
        sketched: Ritz values of S @ H @ S.T, uncorrected.
        residuals: for each, the distance within which S @ H @ S.T has an eigenvalue.
        weights: the Ritz values' weights in the quadrature of the spectrum.
        gradient: the mean loss's gradient, sketched: (out_size,).
        gradient_along: its components along the eigenvectors in sketch space.
        vectors: unit eigenvectors in sketch space, of the largest eigenvalues by size.
        vector_places: which eigenvalues they belong to.
        loss_of_orthogonality: the greatest error of the Krylov basis.
        mode: how products were computed, "autograd" or "finite_difference".
        unit: the loss is the mean over "tokens" or "examples".
        check: how well the products agreed; None if they were not compared.
        scatter: the variance of |S u|^2 for the unit eigenvectors u of H, those of the
            five largest eigenvalues by size and for the others their mean; None, in
            files of earlier versions, stands for a Gaussian matrix's 2 / out_size.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Sec. 5.5: RNEG, R(n), outliers, alignment. The
        correction of eigenvalues is ours: see `unbiased_eigenvalues`.
    """

    model_sketch: ModelSketch
    step: int
    loss: float
    sketched: Tensor
    residuals: Tensor
    weights: Tensor
    gradient: Tensor = field(repr=False)
    gradient_along: Tensor = field(repr=False)
    vectors: Tensor = field(repr=False)
    vector_places: Tensor = field(repr=False)
    loss_of_orthogonality: float
    mode: str
    unit: str
    check: CurvatureCheck | None = None
    scatter: Tensor | None = None

    @cached_property
    def _multiplicities(self) -> tuple[Tensor, Tensor]:
        """How many eigenvalues each Ritz value stands for, and the unproven part.

        Large ones that have converged stand for themselves; the quadrature spreads the
        rest over all others. The start vector's components along the large eigenvectors
        say nothing about the others, so they are left out, as in Hutch++.
        """
        large = torch.zeros(len(self.sketched), dtype=torch.bool)
        large[self.vector_places] = True
        large &= self.residuals <= _CONVERGED * self.sketched.abs()
        weights = self.weights.masked_fill(large, 0.0)
        others = self.model_sketch.out_size - int(large.sum())
        others = others * weights / (float(weights.sum()) or 1.0)
        return large + others, others

    @property
    def trace(self) -> TraceEstimate:
        """tr(H): the large eigenvalues, and the quadrature's mean of all others."""
        multiplicities, others = self._multiplicities
        variance = variance_of_sum(self.sketched.unsqueeze(0), others)
        return TraceEstimate(
            float(multiplicities @ self.sketched), math.sqrt(float(variance))
        )

    @property
    def shift(self) -> float:
        """The amount that the sketch adds to every eigenvalue: tr(H) / out_size.

        Of AFFD and AFJL it is more; see `Sketch.cross_variance`.
        """
        return self.trace.value * self._push

    @cached_property
    def _push(self) -> float:
        return cross_variance(self.model_sketch)

    @cached_property
    def _unbiased(self) -> tuple[Tensor, Tensor]:
        scatter = self.scatter
        if scatter is None:
            scatter = torch.full_like(self.sketched, 2 / self.model_sketch.out_size)
        return unbiased_eigenvalues(
            self.sketched, *self._multiplicities, scatter, self._push
        )

    @property
    def eigenvalues(self) -> Tensor:
        """Estimates of H's eigenvalues at both ends of its spectrum, ascending.

        They correct what the sketch does on average; see `unbiased_eigenvalues`.
        """
        return self._unbiased[0]

    @property
    def standard_errors(self) -> Tensor:
        """Errors of `eigenvalues`: of scatter, residual and correction together."""
        return (self._unbiased[1] + self.residuals.square()).sqrt()

    @property
    def rneg(self) -> float:
        """|Most negative eigenvalue| / greatest positive one; 0 if none is negative."""
        least, greatest = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if least >= 0:
            return 0.0
        return -least / greatest if greatest > 0 else math.inf

    @property
    def ratios(self) -> Tensor:
        """R(n): the n-th largest positive eigenvalue over the largest, (positive,)."""
        positive = self.eigenvalues[self.eigenvalues > 0].flip(0)
        return positive / positive[0] if len(positive) else positive

    def stable_learning_rate(self, momentum: float = 0.0) -> float:
        """Return the rate above which SGD on the whole mean loss is unstable here.

        It is 2 (1 + momentum) / the largest eigenvalue, for heavy-ball momentum and to
        second order around the present weights. Steps of small batches need less, see
        docs/noise.md, and it says nothing of Adam.

        Args:
            momentum: in [0, 1).

        Returns:
            the rate; infinity if no eigenvalue is positive.

        Raises:
            ValueError: `momentum` is out of range.
        """
        check_setting("momentum", 0 <= momentum < 1, "in [0, 1)", momentum)
        greatest = float(self.eigenvalues[-1])
        return 2 * (1 + momentum) / greatest if greatest > 0 else math.inf

    @property
    def outliers(self) -> int:
        """How many eigenvalues have R > 20%."""
        return int((self.ratios > _OUTLIER_RATIO).sum())

    @property
    def alignment(self) -> float:
        """|P g|^2 / |g|^2, g the gradient, P onto the outliers' eigenvectors."""
        along = self.gradient_along.flip(0)[: self.outliers]
        norm = float(self.gradient.double().square().sum())
        return float(along.square().sum()) / norm if norm else 0.0

    def density(
        self, grid: Tensor | None = None, width: float | None = None
    ) -> SpectralDensity:
        """Return the density of all eigenvalues of S @ H @ S.T, from the same products.

        Heights have the noise of one probe; `spectral_density` uses more.
        """
        return quadrature_density(
            [(self.sketched, self.weights)], len(self.sketched), grid, width
        )

    def lifted(self, places: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return S.T @ v of unit norm, by parameter, for eigenvectors v of S @ H @ S.T.

        Their component along an eigenvector of H is about sqrt(out_size / in_size), far
        more than along any other direction; the rest is the sketch's noise.

        Args:
            places: rows of `vectors`.
        """
        found: list[dict[str, Tensor]] = []
        for place in places:
            vector = self.model_sketch.adjoint(self.vectors[place])
            norm = norm_of(vector.values())
            found.append({name: part / norm for name, part in vector.items()})
        return found


def hessian_spectrum(
    operator: SketchedHessian,
    krylov_dim: int,
    *,
    step: int = 0,
    keep_vectors: int = 20,
    seed: int = 0,
    basis_file: str | Path | None = None,
    progress: bool = True,
) -> Spectrum:
    """Compute the spectrum of a sketched Hessian by Lanczos steps.

    Memory is krylov_dim * out_size numbers, plus that of one product. Five more
    products, whose results have the model's size, measure how far the sketch scatters
    the eigenvalues.

    Args:
        operator: the sketched Hessian, at the model's present parameters.
        krylov_dim: number of products, in [1, out_size]. Both ends of the spectrum
            converge first.
        step: the optimizer step, for the record.
        keep_vectors: number of eigenvectors kept, those of the largest eigenvalues.
        seed: seed of the start vector.
        basis_file: file that keeps the Krylov basis instead of memory.
        progress: show a progress bar.

    Raises:
        ValueError: `krylov_dim` or `keep_vectors` is out of range.
        FloatingPointError: a product is not finite.
    """
    check_count("keep_vectors", keep_vectors, least=0)
    found = lanczos(
        operator, krylov_dim, seed=seed, basis_file=basis_file, progress=progress
    )
    curvature = operator.curvature
    loss, gradient = curvature.loss_and_sketched_gradient(operator.model_sketch)
    places = _largest(found, keep_vectors)
    return Spectrum(
        model_sketch=operator.model_sketch,
        step=step,
        loss=loss,
        sketched=found.eigenvalues,
        residuals=found.residuals,
        weights=found.weights,
        gradient=gradient.cpu(),
        gradient_along=found.along_ritz_vectors(gradient),
        vectors=found.ritz_vectors(places.tolist()).to("cpu", torch.float32),
        vector_places=places,
        loss_of_orthogonality=found.loss_of_orthogonality,
        mode=curvature.mode,
        unit=curvature.mean_loss.unit,
        check=curvature.check,
        scatter=_scatter(operator, found),
    )


def _scatter(operator: SketchedHessian, found: LanczosResult) -> Tensor:
    """Return the variance of |S u|^2 for each Ritz value: (krylov_dim,)."""
    places = _largest(found, _MEASURED)
    vectors = found.ritz_vectors(places.tolist())
    measured = [scatter_of(operator, vector) for vector in vectors]
    scatter = torch.full_like(found.eigenvalues, sum(measured) / len(measured))
    scatter[places] = torch.tensor(measured, dtype=scatter.dtype)
    return scatter


def _largest(found: LanczosResult, count: int) -> Tensor:
    """Return the places of the eigenvalues that are largest without the shift."""
    shift = (found.weights * found.eigenvalues).sum()
    sizes = (found.eigenvalues - shift).abs()
    return sizes.topk(min(count, found.steps)).indices.sort().values
