"""How far a sketch scatters each eigenvalue."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sketch.curvature.vectors import norm_of
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import Sketch
from hf_sketch.spectra.sketched_hessian import SketchedHessian


def scatter_of(operator: SketchedHessian, vector: Tensor) -> float:
    """Return the variance of |S u|^2 over the seeds, u a unit eigenvector of H.

    H(S.T @ v) is near u for the eigenvector v of S @ H @ S.T: the other directions,
    which S.T brings in, are weaker by their eigenvalues. It takes a product, and a
    vector of the model's size.

    Shapes:
        vector (out_size,): v
    """
    sketch = operator.model_sketch
    return square_variance(sketch, operator.curvature @ sketch.adjoint(vector))


def square_variance(model_sketch: ModelSketch, vector: Mapping[str, Tensor]) -> float:
    """Return the variance of |S x|^2 / |x|^2 over the seeds.

    Args:
        model_sketch: S.
        vector: x, by name of the parameter.
    """
    parts = {name: vector[name].reshape(1, -1) for name in model_sketch.operators}
    if model_sketch.packed:
        together = [vector[name].flatten() for name in model_sketch.packed]
        parts[""] = torch.cat(together).unsqueeze(0)
    squares = {name: norm_of([x]) ** 2 for name, x in parts.items()}
    total = sum(squares.values()) or 1.0
    variance = 0.0
    for name, operator in _operators(model_sketch).items():
        share = squares[name] / total
        variance += float(operator.square_variance(parts[name])) / total**2
        variance += share * (1 - share) * operator.spread_variance
    return variance


def cross_variance(model_sketch: ModelSketch) -> float:
    """Return the variance of `<S x, S y>` for orthogonal unit x and y, on average."""
    operators = _operators(model_sketch).values()
    weighted = sum(of.shape[1] * of.cross_variance for of in operators)
    return weighted / model_sketch.in_size


def _operators(model_sketch: ModelSketch) -> dict[str, Sketch]:
    """Return the operators by parameter, with that of the packed ones as ""."""
    return {**model_sketch.operators, **model_sketch.packed_operators}
