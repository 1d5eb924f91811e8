"""Eigenvalues of a symmetric operator by the Lanczos method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.curvature.operator import SymmetricOperator, check_dtype, product
from hf_sketch.curvature.vectors import norm_of
from hf_sketch.sketches import CounterRandom
from hf_sketch.sketches.choices import check_count
from hf_sketch.spectra.basis import Basis
from hf_sketch.spectra.checkpoint import LanczosCheckpoint, Steps


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """The operator on the Krylov space of the start vector.

    Shapes:
        alphas, betas, eigenvalues, residuals, weights (steps,), float64, on the CPU
        rotation (steps, steps), float64, on the CPU

    Args:
        alphas: diagonal of the tridiagonal matrix.
        betas: off-diagonal; the last one lies outside of the matrix, and measures how
            far the Krylov space is from an invariant one.
        eigenvalues: eigenvalues of the tridiagonal matrix, ascending: the Ritz values.
        residuals: |A y - theta y| of each Ritz pair: an eigenvalue of A lies within
            this distance of theta.
        weights: squared components of the start vector along the Ritz vectors, of sum
            1; sum(weights * f(eigenvalues)) is Gauss quadrature of v^T f(A) v.
        rotation: eigenvectors of the tridiagonal matrix, as columns.
        basis: the orthonormal basis of the Krylov space.
    """

    alphas: Tensor
    betas: Tensor
    eigenvalues: Tensor
    residuals: Tensor
    weights: Tensor
    rotation: Tensor = field(repr=False)
    basis: Basis = field(repr=False)

    @property
    def steps(self) -> int:
        """Number of products: fewer than asked for if the Krylov space is invariant."""
        return len(self.alphas)

    @cached_property
    def loss_of_orthogonality(self) -> float:
        """The greatest element of |V V^T - 1|, V the basis; computed on first use."""
        return self.basis.loss_of_orthogonality()

    def along_ritz_vectors(self, vector: Tensor) -> Tensor:
        """Return a vector's components along all Ritz vectors: (steps,), float64."""
        return self.rotation.T @ self.basis.products(vector).to("cpu", torch.float64)

    def ritz_vectors(self, indices: Sequence[int]) -> Tensor:
        """Return approximate eigenvectors of unit norm.

        Shapes:
            returns (len(indices), size), in the operator's dtype, on its device

        Args:
            indices: which eigenvalues; `range(-10, 0)` are the ten largest ones.

        Raises:
            IndexError: there is no such eigenvalue.
        """
        return self.basis.combine(self.rotation[:, list(indices)].T)


def lanczos(
    operator: SymmetricOperator,
    steps: int,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    basis_file: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    identity: str = "",
    progress: bool = True,
) -> LanczosResult:
    """Compute eigenvalues at both ends of an operator's spectrum by Lanczos steps.

    Each vector is orthogonalised twice against all before. The basis takes steps * size
    numbers of memory; nothing else is of that size. The run ends early where the Krylov
    space is invariant: where the new vector's norm is at most eps^(3/4) of the largest
    alpha or beta so far. Repeated eigenvalues appear late, through rounding error.

    Args:
        operator: anything with `size`, `dtype`, `device` and `operator @ v`.
        steps: number of products, in [1, operator.size].
        seed: seed of the normal start vector.
        start: another start vector, (size,), of any norm.
        basis_file: file that holds the basis instead of memory. It is overwritten, and
            must stay while the result is in use.
        checkpoint: directory that keeps the steps, in as much disk as the basis. A run
            with the same arguments, or other `steps`, resumes from it with the same
            bits.
        checkpoint_every: steps between two savings.
        identity: name of the operator; a checkpoint of another identity is refused.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range, the operator contradicts itself, or the
            checkpoint belongs to another run or is damaged.
        FloatingPointError: a product is not finite; earlier steps are in the
            checkpoint.
        OSError: a file cannot be written.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Sec. 4: Arnoldi with full reorthogonalisation.
        For a symmetric operator that is this, and only the tridiagonal part is kept.
    """
    check_dtype(operator)
    check_count("checkpoint_every", checkpoint_every)
    if not 1 <= steps <= operator.size:
        raise ValueError(
            f"steps must be in [1, {operator.size}], the operator's size, got {steps}: "
            f"pass steps={min(max(steps, 1), operator.size)}."
        )
    taken = Steps((), (), _start_vector(operator, seed, start))
    run = {
        "size": operator.size,
        "dtype": str(operator.dtype),
        "identity": identity,
        "start": f"seed {seed}",
    }
    if start is not None:
        run["start"] = xxhash.xxh3_128_hexdigest(taken.vector.cpu().numpy().data)
    file = None if basis_file is None else Path(basis_file)
    basis = Basis.empty(steps, operator, file)
    saved = None if checkpoint is None else LanczosCheckpoint(Path(checkpoint), run)
    if saved is not None:
        taken = saved.load(basis) or taken
    with tqdm(total=steps, desc="Lanczos", unit="step", disable=not progress) as bar:
        bar.update(len(taken))
        try:
            while len(taken) < steps and not _is_invariant(taken):
                taken = _step(operator, basis, taken)
                bar.update()
                if saved is not None and len(taken) % checkpoint_every == 0:
                    saved.save(taken, basis)
        finally:
            if saved is not None:
                saved.save(taken, basis)
    return _result(taken, Basis(basis.rows[: len(taken)], basis.device))


def _step(operator: SymmetricOperator, basis: Basis, taken: Steps) -> Steps:
    """Add the next vector to the basis and multiply it."""
    count = len(taken)
    basis.rows[count].copy_(taken.vector)
    vector = product(operator, taken.vector)
    alpha = basis.orthogonalise(count + 1, vector)
    beta = norm_of([vector])
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise FloatingPointError(
            f"The product of step {count + 1} is not finite (alpha={alpha}, "
            f"beta={beta}). Correct the operator and call lanczos again; the checkpoint"
            f" directory, if you passed one, holds {count} steps."
        )
    if beta > 0:
        vector.div_(beta)
    return Steps((*taken.alphas, alpha), (*taken.betas, beta), vector)


def _is_invariant(taken: Steps) -> bool:
    """Return whether the last beta is rounding error of the products."""
    if not taken.betas:
        return False
    largest = max(map(abs, (*taken.alphas, *taken.betas)))
    return taken.betas[-1] <= torch.finfo(taken.vector.dtype).eps ** 0.75 * largest


def _result(taken: Steps, basis: Basis) -> LanczosResult:
    """Diagonalise the tridiagonal matrix."""
    alphas = torch.tensor(taken.alphas, dtype=torch.float64)
    betas = torch.tensor(taken.betas, dtype=torch.float64)
    lower = torch.diag(alphas) + torch.diag(betas[:-1], -1)
    eigenvalues, rotation = torch.linalg.eigh(lower)  # reads the lower triangle alone
    return LanczosResult(
        alphas=alphas,
        betas=betas,
        eigenvalues=eigenvalues,
        residuals=(betas[-1] * rotation[-1]).abs(),
        weights=rotation[0].square(),
        rotation=rotation,
        basis=basis,
    )


def _start_vector(
    operator: SymmetricOperator, seed: int, start: Tensor | None
) -> Tensor:
    """Return the start vector, of unit norm, in memory of its own."""
    if start is None:
        start = CounterRandom(seed, "lanczos-start").normals(0, operator.size)
    if start.shape != (operator.size,):
        raise ValueError(
            f"start must have shape ({operator.size},), got {tuple(start.shape)}: pass "
            "a vector of the operator's size."
        )
    vector = start.detach().to(operator.dtype).to(operator.device)
    norm = norm_of([vector])
    if norm == 0 or not math.isfinite(norm):
        raise ValueError(
            f"start must have a finite norm above 0, got {norm}: pass another vector, "
            "or start=None for a random one."
        )
    return vector / norm
