"""Scoring methods: how a row of a store counts for or against a query."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.choices import check_choice
from hf_sketch.spectra.spectrum import Spectrum
from hf_sketch.store.blocks import RowBlock


class Method(ABC):
    """A symmetric matrix M on sketches and a weight w for each row.

    The score of query q and row r is w * q @ M @ r. It is positive for a proponent: a
    gradient step on the row's example lowers the query's loss. An example's score is
    the sum of its rows' scores, or their mean if `averaged`.
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def transform(self, sketches: Tensor) -> Tensor:
        """M @ sketch for each of them, (n, out_size) -> (n, out_size)."""

    def weights(self, block: RowBlock) -> Tensor | None:
        """The weight of each row, (rows,); None for 1."""
        return None

    @property
    def averaged(self) -> bool:
        """Whether an example's score is the mean of its rows' scores, not the sum."""
        return False

    def problem(self, model_sketch: ModelSketch, column_names: list[str]) -> str | None:
        """Why rows of this map with these columns have no such score, if so."""
        return None


@dataclass(frozen=True)
class Dot(Method):
    """q @ r: to first order, what a step of learning rate 1 takes off the query's loss.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Sec. 5.1.
    """

    def transform(self, sketches: Tensor) -> Tensor:
        return sketches


@dataclass(frozen=True)
class Cosine(Method):
    """q @ r / (|q| |r|), in [-1, 1]: rows of large gradients have no advantage."""

    @property
    def averaged(self) -> bool:
        return True

    def transform(self, sketches: Tensor) -> Tensor:
        return torch.nn.functional.normalize(sketches, dim=1)

    def weights(self, block: RowBlock) -> Tensor | None:
        norms = block.kept.norm(dim=1) * block.scale
        return torch.where(norms == 0, 0.0, 1 / norms)


@dataclass(frozen=True, eq=False)
class TracIn(Method):
    """learning_rate * weight * clip_factor * q @ r: what the example took off the loss.

    Of rows that training recorded, this is the part of the step that was the example's
    (`weight` is its share of the step's loss, `clip_factor` what clipping left of it),
    for plain SGD and to first order. Rows of `sketch_checkpoints` and of steps have a
    learning rate only. Summed over `example_id`, it is TracIn over all steps that were
    recorded, or over checkpoints.

    Shapes:
        steps, clip_factors (steps,)

    Args:
        steps: steps whose clipping is known, ascending; other steps count as unclipped.
        clip_factors: clip factor of each of these steps.

    Reference:
        Pruthi et al. 2020, arXiv:2002.08484, Sec. 3.2 and 3.3.
    """

    steps: Tensor | None = None
    clip_factors: Tensor | None = None
    columns: tuple[str, ...] = ("learning_rate", "weight", "step")

    @classmethod
    def of_steps(cls, steps: Dataset | None) -> "TracIn":
        """Return the method with the clipping recorded in a store's rows of steps."""
        if steps is None or not len(steps):
            return cls()
        columns: Any = steps.select_columns(["step", "clip_factor"])
        rows = columns.with_format("torch")[:]
        order = rows["step"].argsort()
        return cls(rows["step"][order], rows["clip_factor"][order])

    def transform(self, sketches: Tensor) -> Tensor:
        return sketches

    def weights(self, block: RowBlock) -> Tensor | None:
        rates = block.columns["learning_rate"]
        if "weight" not in block.columns:
            return rates
        return rates * block.columns["weight"] * self._clipping(block.columns["step"])

    def _clipping(self, steps: Tensor) -> Tensor:
        """Return the fraction of the gradient that clipping left, per row."""
        if self.steps is None or self.clip_factors is None:
            return torch.ones(len(steps))
        places = torch.searchsorted(self.steps, steps).clamp(max=len(self.steps) - 1)
        return self.clip_factors[places].where(self.steps[places] == steps, 1.0)

    def problem(self, model_sketch: ModelSketch, column_names: list[str]) -> str | None:
        if "learning_rate" in column_names:
            return None
        return (
            "method='tracin' needs rows with a learning_rate, got the columns "
            f"{column_names}: take those of training, or of sketch_checkpoints."
        )


@dataclass(frozen=True, eq=False)
class Preconditioned(Method):
    """q @ inverse(C + damping * tr(C) / examples) @ r, C the rows' mean of r r^T.

    Summed over an example's rows, this estimates up to a factor how much greater the
    query's loss would be without the example. C is the sketched empirical Fisher matrix
    of all recorded states of the model, with a block for each group of layers.

    Shapes:
        covariance (out_size, out_size) or (groups, out_size, out_size), float64

    Args:
        covariance: C, or its blocks.
        examples: number of different examples that the rows are of.
        damping: damping in units of tr(C) / examples, with each block's own trace.

    Raises:
        ValueError: `damping` is not positive, or C is zero or not finite.

    Reference:
        Park et al. 2023, arXiv:2303.14186, Sec. 3.2 (TRAK, without damping and with
        another weighting of examples); Koh and Liang 2017, arXiv:1703.04730.
    """

    covariance: Tensor = field(repr=False)
    examples: int
    damping: float = 1.0
    _factor: Tensor = field(init=False, repr=False)
    _added: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_damping(self.damping)
        traces = self.covariance.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        if not 0 < (trace := float(traces.sum())) < float("inf"):
            raise ValueError(
                "the rows' mean squared length must be positive and finite, got "
                f"{trace}: leave rows out with where(finite=True)."
            )
        damped = self.covariance.clone()
        traces = traces.where(traces > 0, 1.0)  # a group without gradients has no score
        added = self.damping * traces / self.examples
        damped.diagonal(dim1=-2, dim2=-1).add_(added)
        object.__setattr__(self, "_added", added)
        object.__setattr__(self, "_factor", torch.linalg.cholesky(damped))

    @cached_property
    def effective_dimension(self) -> float:
        """tr(C inverse(C + added)): how many directions of the sketch the rows fill."""
        one = torch.eye(self._factor.shape[-1], dtype=self._factor.dtype)
        half = torch.linalg.solve_triangular(self._factor, one, upper=False)
        left = self._added.squeeze(-1) * half.square().sum((-2, -1))
        return self.covariance[..., 0].numel() - float(left.sum())

    def transform(self, sketches: Tensor) -> Tensor:
        shape = self.covariance.shape[:-1]
        numbers = sketches.double().unflatten(1, shape).movedim(0, -1)
        solved = torch.cholesky_solve(numbers, self._factor)
        return solved.movedim(-1, 0).flatten(1).to(sketches.dtype)


@dataclass(frozen=True, eq=False)
class Influence(Method):
    """q @ inverse(|H| + damping * h) @ r, with the Hessian's largest eigenvalues.

    H is known by the eigenvectors that the spectrum keeps and is 0 on all others; h is
    the largest of its eigenvalues by size. Negative eigenvalues count by their size.

    Args:
        spectrum: spectrum of the Hessian, sketched by the map of the rows.
        damping: as a part of h.

    Raises:
        ValueError: `damping` is not positive, or the spectrum keeps no eigenvectors.

    Reference:
        Schioppa et al. 2022, arXiv:2112.03052 (Arnoldi influence), which leaves out
        what is not along the eigenvectors; here it is damped.
    """

    spectrum: Spectrum
    damping: float = 0.03

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not len(self.spectrum.vectors):
            raise ValueError(
                "influence needs a spectrum with eigenvectors, got one without: take it"
                " with hessian_spectrum(..., keep_vectors=20)."
            )

    def transform(self, sketches: Tensor) -> Tensor:
        vectors = self.spectrum.vectors
        values = self.spectrum.eigenvalues[self.spectrum.vector_places].abs()
        damping = self.damping * float(values.max())
        gains = (1 / (values + damping) - 1 / damping).to(sketches)
        return sketches / damping + (sketches @ vectors.T * gains) @ vectors

    def problem(self, model_sketch: ModelSketch, column_names: list[str]) -> str | None:
        if self.spectrum.model_sketch == model_sketch:
            return None
        return (
            "influence needs a spectrum that was sketched by the map of the rows, got "
            "another map: take it of SketchedHessian(hessian, store.model_sketch)."
        )


@dataclass(frozen=True, eq=False)
class OfLayers(Method):
    """A method's score of some groups of layers, or with a weight for each.

    Numbers of queries and rows are multiplied by the root of their group's weight, and
    so is what M makes of them: q @ W^(1/2) M W^(1/2) @ r. Where M is a block for each
    group this is the weighted sum of the groups' scores; "cosine" has the norms of what
    is left.

    Shapes:
        layer_weights (row_size,)

    Args:
        method: the method.
        layer_weights: weight of each number of a row; see `LayerGroups.weights`.
    """

    method: Method
    layer_weights: Tensor
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.method.columns)

    @property
    def averaged(self) -> bool:
        return self.method.averaged

    def transform(self, sketches: Tensor) -> Tensor:
        root = self.layer_weights.sqrt()
        return self.method.transform(sketches * root) * root

    def weights(self, block: RowBlock) -> Tensor | None:
        return self.method.weights(
            replace(block, kept=block.kept * self.layer_weights.sqrt())
        )

    def problem(self, model_sketch: ModelSketch, column_names: list[str]) -> str | None:
        return self.method.problem(model_sketch, column_names)


METHODS: Final[dict[str, Method]] = {"dot": Dot(), "cosine": Cosine()}
# `GradientRows` makes the last two from its rows.
METHOD_NAMES: Final = (*METHODS, "tracin", "preconditioned")


def named_method(name: str, steps: Dataset | None) -> Method:
    """The method of a name, but for "preconditioned", which is made of the rows.

    Raises:
        ValueError: there is none.
    """
    check_choice("method", name, METHOD_NAMES)
    return METHODS.get(name) or TracIn.of_steps(steps)


def check_damping(damping: float) -> None:
    """Raise unless a damping is positive."""
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}: pass e.g. 0.1.")
