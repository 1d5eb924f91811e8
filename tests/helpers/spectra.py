"""Spectra made by hand, and of a quadratic function whose Hessian is known."""

import dataclasses

import torch
from torch import nn

from hf_sketch import (
    CurvatureCheck,
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    Spectrum,
)
from tests.helpers.operators.symmetric import normals

SIZE = 100
SKETCH = ModelSketch((("x", (1000,)),), SIZE)
WIDE = ModelSketch((("x", (2**30,)),), 2**29)  # a sketch that scatters little
VALUES = (-3.0, 0.0, 0.5, 1.0, 4.0, 10.0)
# All of the bulk is at zero, and so is the trace.
WEIGHTS = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def made_of(values=VALUES, weights=WEIGHTS, kept=(0, 4, 5), **fields):
    """A spectrum whose eigenvectors are unit vectors, and the gradient 1, 2, 3, ..."""
    defaults = {
        "model_sketch": SKETCH,
        "step": 3,
        "loss": 0.1,
        "sketched": torch.tensor(values, dtype=torch.float64),
        "residuals": torch.ones(len(values), dtype=torch.float64),
        "weights": torch.tensor(weights, dtype=torch.float64),
        "gradient": torch.arange(1.0, SIZE + 1),
        "gradient_along": torch.arange(1.0, len(values) + 1).double(),
        "vectors": torch.eye(SIZE)[list(kept)],
        "vector_places": torch.tensor(kept, dtype=torch.int64),
        "loss_of_orthogonality": 1e-14,
        "mode": "autograd",
        "unit": "tokens",
        "check": CurvatureCheck(0.25, 1e-7),
    }
    return Spectrum(**{**defaults, **fields})


class Quadratic(nn.Module):
    """The loss 0.5 x.T Q.T diag(eigenvalues) Q x, with Q = 1 - 2 u u.T."""

    def __init__(self, eigenvalues, dtype=torch.float32):
        super().__init__()
        self.eigenvalues = torch.as_tensor(eigenvalues, dtype=dtype)
        self.u = nn.functional.normalize(normals(len(eigenvalues)), dim=0).to(dtype)
        self.x = nn.Parameter(normals(len(eigenvalues), seed=1).to(dtype))

    def forward(self, rows):
        y = self.x - 2 * self.u * (self.u @ self.x)
        return {"loss": 0.5 * (self.eigenvalues * y.square()).sum() + 0 * rows.sum()}

    def eigenvector(self, place):
        vector = -2 * self.u * self.u[place]
        vector[place] += 1
        return vector


def sketched(model, out_size, seed=0, operator="affd"):
    sketch = ModelSketch.from_model(model, out_size, seed=seed, operator=operator)
    batch = {"rows": torch.zeros(2, 1)}
    hessian = HessianOperator(
        model, [batch], lambda output, _: output["loss"], self_check=False
    )
    return SketchedHessian(hessian, sketch)


def assert_equal(one, other):
    """Two spectra are the same, bit for bit."""
    for field in dataclasses.fields(Spectrum):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name
