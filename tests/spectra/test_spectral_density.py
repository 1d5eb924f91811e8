import math

import pytest
import torch

from hf_sketch import estimate_trace, spectral_density
from hf_sketch.spectra.density import _signs, quadrature_density
from tests.helpers.operators.symmetric import Diagonal, Matrix, goe, with_eigenvalues

SIZE = 300
BIMODAL = torch.cat([torch.linspace(-1, -0.5, 200), torch.linspace(1, 3, 100)]).double()


def density(operator, **arguments):
    return spectral_density(operator, progress=False, **arguments)


def trace(operator, products, seed=0):
    return estimate_trace(operator, products=products, seed=seed, progress=False)


def bumps(grid, nodes, width):
    """Gaussian bumps, written out: (points, nodes)."""
    distances = (grid[:, None] - nodes) / width
    return torch.exp(-(distances**2) / 2) / (width * math.sqrt(2 * math.pi))


def assert_near_the_histogram(result, eigenvalues, matrix, probes):
    """Every point is within five standard errors of the eigenvalues' own bumps.

    Of random signs z and a symmetric F, z^T F z has the mean tr F and the variance
    2 (|F|^2 - sum of squares of F's diagonal), at most 2 |F|^2. The quadrature's own
    error is at most exp(-8) of the highest bump.
    """
    values, vectors = torch.linalg.eigh(matrix)
    heights = bumps(result.grid, values, result.width) / len(values)
    diagonals = heights @ vectors.square().T
    variance = 2 * (heights.square().sum(1) - diagonals.square().sum(1)) / probes
    peak = 1 / (result.width * math.sqrt(2 * math.pi))
    error = (result.density - heights.sum(1)).abs()
    assert (error < 5 * variance.sqrt() + math.exp(-8) * peak).all()
    assert (error > 0.2 * variance.sqrt()).any()  # the bound is not idle
    return variance.sqrt()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("probes", [2, 40])
def test_the_density_is_that_of_the_eigenvalues(seed, probes):
    matrix, _ = with_eigenvalues(BIMODAL)
    result = density(Matrix(matrix), probes=probes, steps=40, seed=seed)
    assert_near_the_histogram(result, BIMODAL, matrix, probes)


def test_the_standard_error_is_the_spread_that_theory_gives():
    matrix, _ = with_eigenvalues(BIMODAL)
    result = density(Matrix(matrix), probes=200, steps=30)
    expected = assert_near_the_histogram(result, BIMODAL, matrix, 200)
    there = expected > 0.1 * expected.max()
    ratio = result.standard_error[there] / expected[there]
    # A sample's standard deviation is off by 1 / sqrt(2 * 200) for near normal values.
    assert (ratio - 1).abs().max() < 5 / math.sqrt(2 * 200)


def test_the_density_of_a_goe_matrix_is_a_semicircle():
    size, probes = 600, 60
    result = density(Matrix(goe(size)), probes=probes, steps=25, width=0.1)
    x = torch.linspace(-1, 1, 4001).double()
    semicircle = 2 / math.pi * (1 - x**2).sqrt()
    expected = bumps(result.grid, x, result.width) @ semicircle * (x[1] - x[0])
    # The number of eigenvalues below a point has a standard deviation of about 1, so
    # the density one of a bump / size. The signs add sqrt(2 |f|^2 / size / probes),
    # |f|^2 the integral of bump^2 and semicircle.
    bump = 1 / (result.width * math.sqrt(2 * math.pi))
    spread = math.sqrt(2 * bump * math.sqrt(0.5) * (2 / math.pi) / size / probes)
    bound = 3 * bump / size + 5 * spread
    assert (result.density - expected).abs().max() < bound
    assert expected.max() > 9 * bound  # the bound is not idle


@pytest.mark.parametrize("steps", [1, 3, 20, SIZE])
@pytest.mark.parametrize("width", [None, 1e-3, 1.0])
def test_the_integral_is_one(steps, width):
    operator = Matrix(with_eigenvalues(BIMODAL)[0])
    result = density(operator, probes=3, steps=steps, width=width)
    assert abs(torch.trapezoid(result.density, result.grid) - 1) < 1e-8
    assert (result.density >= 0).all()


def test_the_integral_is_one_in_float32():
    result = density(Diagonal(BIMODAL.float()), probes=3, steps=20)
    assert result.density.dtype == torch.float64
    assert abs(torch.trapezoid(result.density, result.grid) - 1) < 1e-5


def test_the_mean_of_the_density_is_hutchinsons_trace():
    matrix, _ = with_eigenvalues(BIMODAL)
    result = density(Matrix(matrix), probes=4, steps=10, seed=2)
    probes = [_signs(Matrix(matrix), 2, "slq-probe", number) for number in range(4)]
    expected = sum(z @ matrix @ z for z in probes) / 4 / SIZE
    mean = torch.trapezoid(result.density * result.grid, result.grid)
    assert abs(mean - expected) < 1e-8


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-4])
def test_a_single_eigenvalue_is_one_bump(value):
    result = density(Diagonal(torch.full((SIZE,), value)), probes=2, steps=10)
    assert abs(torch.trapezoid(result.density, result.grid) - 1) < 1e-8
    peak = result.grid[result.density.argmax()]
    assert abs(peak - value) < 0.3 * result.width
    assert result.width == pytest.approx((1e-3 * abs(value) or 1.0) / 10)


def test_the_default_width_is_the_range_over_the_steps():
    eigenvalues = torch.cat([BIMODAL, torch.tensor([-9.0, 11])])
    result = density(Diagonal(eigenvalues), probes=3, steps=40)
    assert result.width == pytest.approx(20 / 40, rel=1e-6)
    assert float(result.grid[0]) == pytest.approx(-9 - 6 * 0.5)
    assert float(result.grid[-1]) == pytest.approx(11 + 6 * 0.5)
    assert float(result.grid[1] - result.grid[0]) <= 0.5 / 4 + 1e-9


def test_single_ritz_values_show_only_below_the_default_width():
    operator = Matrix(with_eigenvalues(torch.linspace(0, 1, SIZE))[0])

    def wiggles(width):
        grid = torch.linspace(0.3, 0.7, 500)
        result = density(operator, probes=1, steps=40, width=width, grid=grid)
        return int((result.density.diff().sign().diff() != 0).sum())

    # A bump of the width sees the probe's own spread at a scale of some widths.
    assert wiggles(None) <= 0.4 / (1 / 40)
    assert wiggles(1 / 40 / 8) > 0.4 * 40


def test_a_grid_can_be_given():
    operator = Matrix(with_eigenvalues(BIMODAL)[0])
    whole = density(operator, probes=3, steps=30, width=0.2)
    grid = whole.grid[10:40:3].float()
    part = density(operator, probes=3, steps=30, width=0.2, grid=grid)
    torch.testing.assert_close(part.grid, grid.double())
    torch.testing.assert_close(part.density, whole.density[10:40:3], atol=1e-5, rtol=0)


def test_a_quadrature_at_hand_becomes_a_density():
    nodes, weights = torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.25, 0.75])
    grid = torch.linspace(-2, 3, 11)
    result = quadrature_density([(nodes, weights.double())], 5, grid, 0.5)
    expected = bumps(grid.double(), nodes, 0.5) @ weights.double()
    torch.testing.assert_close(result.density, expected)
    assert quadrature_density([(nodes, weights.double())], 5).width == 3 / 5
    with pytest.raises(ValueError, match=r"width must be above 0, got -1\.0: pass"):
        quadrature_density([(nodes, weights.double())], 5, width=-1.0)


def test_one_probe_has_no_standard_error():
    result = density(Diagonal(BIMODAL), probes=1, steps=10)
    assert result.standard_error.isnan().all()
    assert result.density.isfinite().all()


@pytest.mark.usefixtures("no_generator_use")
def test_estimates_are_functions_of_the_seed():
    operator = Matrix(goe(SIZE))
    first, again, other = (
        density(operator, probes=2, steps=9, width=0.1, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.density, again.density)
    assert not torch.allclose(first.density[:99], other.density[:99])
    assert trace(operator, 9) == trace(operator, 9)
    assert trace(operator, 9) != trace(operator, 9, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_independent_fair_signs(dtype):
    operator = Diagonal(torch.ones(10_001, dtype=dtype))
    probes = torch.stack([_signs(operator, 0, "slq-probe", i) for i in range(8)])
    assert probes.dtype == dtype
    assert (probes.abs() == 1).all()
    assert torch.equal(probes.square().sum(1), torch.full((8,), 10_001.0).to(dtype))
    # Inner products and sums of 10001 signs have the standard deviation sqrt(10001).
    products = probes @ probes.T - 10_001 * torch.eye(8)
    assert products.abs().max() < 5 * math.sqrt(10_001)
    assert probes.sum(1).abs().max() < 5 * math.sqrt(10_001)
    other = _signs(operator, 0, "trace-probe", 0)
    assert abs(other @ probes[0]) < 5 * math.sqrt(10_001)


@pytest.mark.parametrize("products", [4, 5, 6, 30, 100])
def test_products_are_counted_exactly(products):
    for matrix in (goe(SIZE), torch.zeros(SIZE, SIZE), torch.ones(SIZE, SIZE)):
        operator = Matrix(matrix)
        trace(operator, products)
        assert operator.products == products
    operator = Matrix(goe(SIZE))
    density(operator, probes=3, steps=7)
    assert operator.products == 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be an integer of at least 1, got 0"),
        ({"steps": SIZE + 1}, r"\[1, 300\].*got 301: pass steps=300"),
        ({"steps": 9, "width": 0.0}, r"width must be above 0, got 0\.0: pass None"),
        ({"steps": 9, "width": math.nan}, "width must be above 0, got nan: pass None"),
    ],
)
def test_densities_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        density(Matrix(goe(SIZE)), **arguments)


def test_bad_operators_are_refused():
    with pytest.raises(ValueError, match=r"got torch\.float16\. Take v"):
        trace(Matrix(goe(SIZE).half()), 9)
    with pytest.raises(ValueError, match=r"got torch\.float16\. Take v"):
        density(Matrix(goe(SIZE).half()))

    def spoil(v):
        v[5] = math.nan
        return v

    for number in (2, 5, 8):  # of the sketch, of its part, of the remainder
        operator = Matrix(goe(SIZE), spoilt_product=number, spoil=spoil)
        with pytest.raises(FloatingPointError, match=f"Product {number} has 1 of 300"):
            trace(operator, 9)
    operator = Matrix(goe(SIZE), spoilt_product=25, spoil=spoil)
    with pytest.raises(FloatingPointError, match="step 5 is not finite"):
        density(operator, probes=3, steps=10)


def test_there_are_progress_bars_if_wanted(capsys):
    density(Matrix(goe(SIZE)), probes=2, steps=3)
    trace(Matrix(goe(SIZE)), 5)
    assert capsys.readouterr().err == ""
    spectral_density(Matrix(goe(SIZE)), probes=2, steps=3)
    estimate_trace(Matrix(goe(SIZE)), products=5)
    shown = capsys.readouterr().err
    assert "Density: 100%" in shown
    assert "Trace: 100%" in shown
