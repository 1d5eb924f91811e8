"""The variance of a whole model's |S x|^2, against draws of S."""

import math
from types import SimpleNamespace

import pytest
import torch

from hf_sketch import CounterRandom, ModelSketch
from hf_sketch.spectra.scatter import scatter_of, square_variance

SHAPES = (("wide", (256, 256)), ("deep", (128, 520)), ("short", (100,)), ("b", (7, 9)))
OUT_SIZE, SEEDS = 64, 300


def vector(of=("wide", "deep", "short", "b")):
    """A vector whose parts weigh about the same, some of low rank."""
    parts = {}
    for number, (name, shape) in enumerate(SHAPES):
        values = CounterRandom(number, "x").normals(0, math.prod(shape)).view(shape)
        if name == "wide":
            values = torch.outer(values[0], values[1])
        parts[name] = values / values.norm() * (name in of)
    return parts


@pytest.mark.parametrize("of", [("wide", "deep", "short"), ("short",)], ids=str)
@pytest.mark.parametrize("operator", ["srht", "affd", "afjl", "qk"])
def test_the_variance_is_that_of_draws_of_the_sketch(operator, of):
    """Within five standard errors, by the draws' own kurtosis.

    AFFD shares magnitudes between parameters, which adds at most 6 / n.
    """
    x = vector(of)
    norm = len(of)
    draws = torch.tensor(
        [
            float(
                ModelSketch(SHAPES, OUT_SIZE, seed=seed, operator=operator)
                .sketch(x)
                .double()
                .square()
                .sum()
                / norm
            )
            for seed in range(SEEDS)
        ],
        dtype=torch.float64,
    )
    wanted = square_variance(ModelSketch(SHAPES, OUT_SIZE, operator=operator), x)
    squares = (draws - 1).square()
    error = squares.std() / math.sqrt(SEEDS)
    assert abs(draws.mean() - 1) < 5 * math.sqrt(wanted / SEEDS) + 1e-6
    assert abs(squares.mean() - wanted) < 5 * error + 1e-6 + 0.15 * wanted * (
        operator == "qk"
    )


def test_the_vector_is_the_product_with_the_lifted_eigenvector():
    sketch = ModelSketch(SHAPES, OUT_SIZE)
    asked = []

    class Doubled:
        def __matmul__(self, lifted):
            asked.append(lifted)
            return {name: 2 * part for name, part in lifted.items()}

    v = CounterRandom(0, "v").normals(0, OUT_SIZE)
    operator = SimpleNamespace(model_sketch=sketch, curvature=Doubled())
    found = scatter_of(operator, v)
    assert found == pytest.approx(square_variance(sketch, sketch.adjoint(v)))
    (lifted,) = asked
    assert all(torch.equal(lifted[n], part) for n, part in sketch.adjoint(v).items())


def test_a_product_of_zero_scatters_nothing():
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES}
    assert square_variance(ModelSketch(SHAPES, OUT_SIZE), nothing) == 0
