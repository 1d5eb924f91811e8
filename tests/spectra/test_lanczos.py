import math

import pytest
import torch

from hf_sketch import lanczos
from tests.helpers.lanczos_runs import SIZE, assert_same_bits, run
from tests.helpers.operators.symmetric import (
    Diagonal,
    Matrix,
    goe,
    normals,
    with_eigenvalues,
)
from tests.helpers.tiers import full

EVEN = torch.linspace(-1, 2, SIZE).double()
SPECTRA = {
    "even": EVEN,
    "clustered": torch.cat([EVEN[:40] * 1e-3 + 1, EVEN[40:80] * 1e-3 - 1, EVEN[80:]]),
    "outliers": torch.cat([EVEN[:-3] * 1e-4, torch.tensor([-5.0, 70.0, 1000.0])]),
    "ill-conditioned": torch.logspace(-8, 3, SIZE).double(),
}

each_spectrum = pytest.mark.parametrize("name", SPECTRA)


@each_spectrum
def test_all_eigenvalues_are_found_in_a_step_per_dimension(name):
    matrix, _ = with_eigenvalues(SPECTRA[name])
    result = run(Matrix(matrix), SIZE)
    exact = torch.linalg.eigvalsh(matrix)
    assert result.steps == SIZE
    assert (result.eigenvalues - exact).abs().max() < 1e-12 * exact.abs().max()


def test_both_ends_of_the_spectrum_converge_first():
    matrix, _ = with_eigenvalues(torch.cat([EVEN, torch.tensor([-4.0, -2, 4, 5])]))
    result = run(Matrix(matrix), 50)
    exact = torch.linalg.eigvalsh(matrix)
    ends = [0, 1, -2, -1]
    assert (result.eigenvalues[ends] - exact[ends]).abs().max() < 1e-10
    assert result.residuals[ends].max() < 1e-5
    assert result.residuals.max() > 1e-3  # the inside has not converged


def test_the_ends_are_those_of_arpack():
    sparse = pytest.importorskip("scipy.sparse.linalg")
    operator = Matrix(goe(SIZE))

    def multiply(v):
        return (operator @ torch.from_numpy(v).double().view(-1)).numpy()

    linear = sparse.LinearOperator((SIZE, SIZE), multiply, dtype="float64")
    ours = run(operator, 90)
    values, vectors = sparse.eigsh(linear, k=6, which="BE", v0=normals(SIZE).numpy())
    order = values.argsort()
    ends = [0, 1, 2, -3, -2, -1]
    assert abs(ours.eigenvalues[ends].numpy() - values[order]).max() < 1e-10
    overlaps = ours.ritz_vectors(ends) @ torch.from_numpy(vectors[:, order].copy())
    assert (overlaps.abs() - torch.eye(6)).abs().max() < 1e-6


@each_spectrum
@pytest.mark.parametrize("steps", [1, 40, *full(7)])
def test_an_eigenvalue_lies_within_each_residual(name, steps):
    matrix, _ = with_eigenvalues(SPECTRA[name])
    result = run(Matrix(matrix), steps)
    exact = torch.linalg.eigvalsh(matrix)
    distances = (result.eigenvalues[:, None] - exact).abs().min(1).values
    assert (distances <= result.residuals + 1e-12 * exact.abs().max()).all()


@each_spectrum
@pytest.mark.parametrize("steps", [7, *full(40)])
def test_residuals_are_the_norms_that_they_say(name, steps):
    matrix, _ = with_eigenvalues(SPECTRA[name])
    result = run(Matrix(matrix), steps)
    vectors = result.ritz_vectors(range(steps))
    errors = vectors @ matrix - result.eigenvalues[:, None] * vectors
    torch.testing.assert_close(
        errors.norm(dim=1), result.residuals, rtol=1e-6, atol=1e-11
    )


def test_converged_ritz_vectors_are_eigenvectors():
    eigenvalues = SPECTRA["outliers"]
    matrix, exact = with_eigenvalues(eigenvalues)
    result = run(Matrix(matrix), 20)
    vectors = result.ritz_vectors([0, -2, -1])
    assert vectors.shape == (3, SIZE)
    overlaps = vectors @ exact[:, [-3, -2, -1]]
    assert (overlaps.abs() - torch.eye(3)).abs().max() < 1e-10


def test_one_can_ask_for_the_largest_in_any_order():
    result = run(Matrix(goe(SIZE)), 30)
    every = result.ritz_vectors(range(30))
    torch.testing.assert_close(result.ritz_vectors(range(-3, 0)), every[-3:])
    torch.testing.assert_close(result.ritz_vectors([5, 2]), every[[5, 2]])
    with pytest.raises(IndexError, match="30"):
        result.ritz_vectors([30])


def test_the_tridiagonal_matrix_is_the_operator_in_the_basis():
    matrix = goe(SIZE)
    result = run(Matrix(matrix), 60)
    rows = result.basis.rows
    t = torch.diag(result.alphas)
    t += torch.diag(result.betas[:-1], 1) + torch.diag(result.betas[:-1], -1)
    assert (rows @ matrix @ rows.T - t).abs().max() < 1e-13
    assert (result.betas > 0).all()


def test_weights_integrate_polynomials_as_a_gauss_quadrature():
    matrix, start = goe(SIZE), normals(SIZE, seed=3)
    result = run(Matrix(matrix), 6, start=start)
    start = start / start.norm()
    vector = start
    for degree in range(12):  # exact up to 2 * 6 - 1
        moment = (result.weights * result.eigenvalues**degree).sum()
        assert abs(moment - start @ vector) < 1e-13, degree
        vector = matrix @ vector
    moment = (result.weights * result.eigenvalues**12).sum()
    assert abs(moment - start @ vector) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [1, 5])
def test_a_run_ends_where_the_krylov_space_is_invariant(dtype, distinct):
    values = (torch.arange(SIZE) % distinct - 1).to(dtype)
    for operator in (Diagonal(values), Matrix(with_eigenvalues(values)[0].to(dtype))):
        result = run(operator, 50)
        assert result.steps == distinct
        assert len(result.basis.rows) == len(result.alphas) == distinct
        eps = torch.finfo(dtype).eps
        exact = torch.arange(distinct).double() - 1
        assert (result.eigenvalues - exact).abs().max() < 50 * eps
        assert result.betas[-1] <= 4 * eps**0.75


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_results_scale_with_the_operator(factor):
    matrix, _ = with_eigenvalues(torch.arange(SIZE) % 5 - 1)
    result, scaled = run(Matrix(matrix), 50), run(Matrix(factor * matrix), 50)
    assert scaled.steps == 5
    assert torch.equal(scaled.alphas, factor * result.alphas)
    assert torch.equal(scaled.betas, factor * result.betas)


def test_copies_of_a_multiple_eigenvalue_come_late():
    eigenvalues = EVEN.clone()
    eigenvalues[-6:] = 3.0
    operator = Matrix(with_eigenvalues(eigenvalues)[0])
    early = run(operator, 30).eigenvalues
    assert (early > 2.9).sum() == 1
    assert abs(early[-1] - 3) < 1e-12
    assert (run(operator, SIZE).eigenvalues - eigenvalues).abs().max() < 1e-12


def test_the_zero_operator_takes_one_step():
    result = run(Diagonal(torch.zeros(SIZE)), 10)
    assert (result.steps, result.eigenvalues.tolist()) == (1, [0.0])
    assert result.residuals.tolist() == [0.0]


def test_the_bulk_beside_a_large_outlier_is_no_invariant_space():
    # float32: betas within the bulk are 5e-5 of the outlier.
    eigenvalues = torch.cat([torch.linspace(-1e-4, 1e-4, 999), torch.ones(1)])
    result = run(Diagonal(eigenvalues), 60)
    assert result.steps == 60
    assert abs(result.eigenvalues[0] + 1e-4) < 1e-6


def test_operators_that_return_their_argument_or_a_buffer_are_safe():
    class Identity(Diagonal):
        def __matmul__(self, v):
            return v

    class Buffered(Matrix):
        def __matmul__(self, v):
            return torch.mv(self.matrix, v, out=buffer)

    buffer = torch.empty(SIZE).double()
    result = run(Identity(torch.ones(SIZE)), 10)
    assert (result.steps, result.loss_of_orthogonality < 1e-6) == (1, True)
    matrix = goe(SIZE)
    assert_same_bits(run(Buffered(matrix), 20), run(Matrix(matrix), 20))


def test_products_may_carry_a_graph():
    matrix = goe(SIZE).requires_grad_()
    result = run(Matrix(matrix), 5)
    assert not result.basis.rows.requires_grad
    assert_same_bits(result, run(Matrix(matrix.detach()), 5))


@pytest.mark.usefixtures("no_generator_use")
def test_the_start_vector_is_a_function_of_the_seed():
    operator = Matrix(goe(SIZE))
    first, again, other = (run(operator, 9, seed=seed) for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert not torch.equal(first.alphas, other.alphas)


def test_a_start_vector_of_any_norm_can_be_given():
    operator, start = Matrix(goe(SIZE)), normals(SIZE, seed=5)
    result = run(operator, 9, start=start)
    torch.testing.assert_close(result.basis.rows[0], start / start.norm())
    assert_same_bits(result, run(operator, 9, start=4 * start))
    assert torch.equal(start, normals(SIZE, seed=5))


@pytest.mark.parametrize("steps", [0, -1, SIZE + 1])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    fix = min(max(steps, 1), SIZE)
    with pytest.raises(ValueError, match=rf"\[1, 120\].*got {steps}: pass steps={fix}"):
        run(Matrix(goe(SIZE)), steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": torch.ones(3)}, r"shape \(120,\), got \(3,\): pass a vector"),
        ({"start": torch.zeros(SIZE)}, r"norm above 0, got 0\.0: .*start=None"),
        ({"start": torch.full((SIZE,), math.inf)}, "norm above 0, got inf"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(Matrix(goe(SIZE)), 4, **arguments)


def test_operators_that_contradict_themselves_are_refused():
    matrix = goe(SIZE)
    with pytest.raises(ValueError, match=r"float32 or .*got torch\.bfloat16\. Take v"):
        run(Matrix(matrix.bfloat16()), 4)
    with pytest.raises(ValueError, match=r"shape \(120,\).*got \(119,\).*Return"):
        run(Matrix(matrix, spoilt_product=2, spoil=lambda v: v[1:]), 4)
    with pytest.raises(ValueError, match=r"torch\.float64.*got .*float32\. Return"):
        run(Matrix(matrix, spoilt_product=2, spoil=lambda v: v.float()), 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_product_that_is_not_finite_is_reported_with_its_step(value):
    def spoil(v):
        v[17] = value
        return v

    operator = Matrix(goe(SIZE), spoilt_product=5, spoil=spoil)
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite.*checkpoint"):
        run(operator, 20)
    assert operator.products == 5


def test_there_is_a_progress_bar_if_wanted(capsys):
    run(Matrix(goe(SIZE)), 5)
    assert capsys.readouterr().err == ""
    lanczos(Matrix(goe(SIZE)), 5)
    assert "Lanczos: 100%" in capsys.readouterr().err


@pytest.mark.full
def test_a_long_run_in_float32_finds_outliers_over_a_bulk(tmp_path):
    size, outliers = 2**16, torch.tensor([-20.0, 15, 40, 60, 200])
    elements = torch.cat([torch.linspace(-1, 1, size - 5), outliers])
    result = run(Diagonal(elements), 200, basis_file=tmp_path / "basis")
    assert result.steps == 200
    assert result.loss_of_orthogonality < 1e-5
    found = result.eigenvalues[[0, -4, -3, -2, -1]]
    assert (found - outliers).abs().max() < 1e-5 * 200
    assert result.residuals[[0, -4, -3, -2, -1]].max() < 1e-5 * 200
    assert result.eigenvalues[1:-4].abs().max() < 1 + 1e-5 * 200
    vectors = result.ritz_vectors(range(-4, 0))
    assert (vectors[:, -4:].abs() - torch.eye(4)).abs().max() < 1e-5
