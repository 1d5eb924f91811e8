import math

import pytest
import torch

from hf_sketch import ModelSketch, hessian_spectrum
from tests.helpers.curvature_oracles import relative
from tests.helpers.spectra import (
    SIZE,
    VALUES,
    WIDE,
    Quadratic,
    assert_equal,
    made_of,
    sketched,
)

SPREAD = (0.25, 0.25, 0.2, 0.2, 0.05, 0.05)


def test_statistics_of_eigenvalues_without_a_shift():
    spectrum = made_of(model_sketch=WIDE)
    assert (spectrum.trace.value, spectrum.shift) == pytest.approx((0, 0))
    assert spectrum.eigenvalues.tolist() == pytest.approx(list(VALUES))
    assert spectrum.rneg == pytest.approx(0.3)
    assert spectrum.ratios.tolist() == pytest.approx([1, 0.4, 0.1, 0.05])
    assert spectrum.outliers == 2
    total = sum(i * i for i in range(1, SIZE + 1))
    assert spectrum.alignment == pytest.approx((25 + 36) / total)


def test_statistics_are_of_the_eigenvalues_without_the_shift():
    moved = made_of([value + 7 for value in VALUES], model_sketch=WIDE)
    assert moved.trace.value == pytest.approx(7 * WIDE.out_size)
    assert moved.shift == pytest.approx(7)
    assert moved.eigenvalues.tolist() == pytest.approx(list(VALUES))
    assert moved.rneg == pytest.approx(0.3)
    assert moved.outliers == 2


def undone(sketched, counts, size, scatter=None):
    """Each eigenvalue and the slope, by loops; see `unbiased_eigenvalues`."""
    scatter, found = scatter or 2 / size, []
    for i, s in enumerate(sketched):
        pushes = slope = 0.0
        for j, other in enumerate(sketched):
            if i != j:
                square = (s - other) ** 2 + scatter * s**2
                pushes += counts[j] * other * (s - other) / square / size
                slope += counts[j] * other / square / size
        value = s / (1 + pushes)
        found.append((value, value / s + slope * value**2 / s if s else math.nan))
    return found


def test_eigenvalues_that_push_each_other_are_put_back():
    sketched, weights = (-30.0, 0.0, 1.0, 25.0, 40.0), (0.1, 0.4, 0.5, 0.0, 0.0)
    residuals = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    spectrum = made_of(sketched, weights, (3, 4), residuals=residuals)
    counts = [0.1 * 98, 0.4 * 98, 0.5 * 98, 1, 1]
    wanted = undone(sketched, counts, SIZE)
    for place in (0, 3, 4):  # those outside of the bulk
        value, gain = wanted[place]
        assert float(spectrum.eigenvalues[place]) == pytest.approx(value)
        error = float(spectrum.standard_errors[place]) ** 2 - float(residuals[place])
        assert error > 2 / SIZE * value**2 * gain
    alone, _ = undone(sketched, [*counts[:3], 0, 1], SIZE)[4]
    assert wanted[4][0] < alone - 25 / SIZE  # its neighbour pushed it outwards


def test_within_the_bulk_only_the_shift_is_taken_off():
    sketched = [*torch.linspace(-1, 1, 21).tolist(), 30.0]
    weights = [*[1 / 21] * 21, 0.0]
    spectrum = made_of(sketched, weights, (21,), residuals=torch.zeros(22).double())
    middle = spectrum.eigenvalues[9:12] - torch.tensor(sketched[9:12])
    assert middle.tolist() == pytest.approx([-spectrum.shift] * 3)
    assert (spectrum.eigenvalues.diff() >= 0).all()
    assert spectrum.eigenvalues.isfinite().all()
    assert spectrum.standard_errors.isfinite().all()


def test_the_trace_counts_converged_eigenvalues_and_the_mean_of_all_others():
    residuals = torch.tensor([1.0, 0, 0, 0, 0.04, 0.1], dtype=torch.float64)
    trace = made_of(weights=SPREAD, residuals=residuals).trace
    # 4 and 10 are known to 1%, -3 is not: 98 eigenvalues have the others' mean.
    mean = (0.25 * -3 + 0.25 * 0 + 0.2 * 0.5 + 0.2 * 1) / 0.9
    square = (0.25 * 9 + 0.25 * 0 + 0.2 * 0.25 + 0.2) / 0.9
    assert trace.value == pytest.approx(14 + 98 * mean)
    assert trace.standard_error == pytest.approx(math.sqrt(196 * (square - mean**2)))


def test_standard_errors_are_scatter_residual_and_what_one_probe_leaves():
    alone = made_of(model_sketch=WIDE)
    size = WIDE.out_size
    wanted = [math.sqrt(2 / size * v * v + 1) for v in VALUES]
    assert alone.standard_errors.tolist() == pytest.approx(wanted)
    # No eigenvalue has converged: of s = 10, all but its own weight is one probe's.
    sketched, weights = (0.0, 1.0, 10.0), (0.5, 0.5, 0.0)
    residuals = torch.zeros(3, dtype=torch.float64)
    spectrum = made_of(sketched, weights, (), residuals=residuals)
    value, gain = undone(sketched, [50, 50, 0], SIZE)[2]
    terms = [(1 + s * (10 - s) / ((10 - s) ** 2 + 2 / SIZE * 100)) / 10 for s in (0, 1)]
    probe = 2 * SIZE * ((terms[0] - terms[1]) / 2) ** 2 / SIZE**2
    variance = 2 / SIZE * value**2 * gain + value**4 * probe
    assert float(spectrum.standard_errors[2]) == pytest.approx(math.sqrt(variance))


def test_the_operators_own_scatter_widens_the_errors():
    sketched, weights = (0.0, 1.0, 25.0, 40.0), (1.0, 0.0, 0.0, 0.0)
    residuals = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    scatter = torch.tensor([0.02, 0.02, 0.08, 0.01], dtype=torch.float64)
    spectrum = made_of(sketched, weights, (2, 3), residuals=residuals, scatter=scatter)
    for place in (2, 3):
        variance = float(scatter[place])
        value, gain = undone(sketched, [98, 0, 1, 1], SIZE, variance)[place]
        assert float(spectrum.eigenvalues[place]) == pytest.approx(value)
        error = float(spectrum.standard_errors[place])
        assert error == pytest.approx(math.sqrt(variance * gain) * value)


@pytest.mark.parametrize(
    ("operator", "strength"),
    [("srht", 1), ("affd", 1 + 256 / 2048), ("afjl", 3 - 0.125)],
)
def test_an_operator_moves_eigenvalues_by_its_own_amount(operator, strength):
    """On one block of n: AFFD by (1 + D / n) tr(H) / D, AFJL by (3 - D / n) of that."""
    sketch = ModelSketch((("x", (2048,)),), 256, operator=operator)
    moved = made_of([value + 7 for value in VALUES], model_sketch=sketch)
    assert moved.shift == pytest.approx(7 * strength)


def test_the_density_is_bumps_at_the_ritz_values():
    spread = made_of(weights=SPREAD)
    density = spread.density(torch.tensor([-3.0, 0.0, 4.0]), width=0.5)

    def bump(x, center):
        return math.exp(-(((x - center) / 0.5) ** 2) / 2) / (0.5 * math.sqrt(math.tau))

    wanted = [
        sum(w * bump(x, v) for w, v in zip(SPREAD, VALUES, strict=True))
        for x in (-3, 0, 4)
    ]
    assert density.density.tolist() == pytest.approx(wanted)
    whole = spread.density()
    assert float(torch.trapezoid(whole.density, whole.grid)) == pytest.approx(1, 1e-6)


def test_spectra_without_eigenvalues_above_zero_have_statistics_too():
    nothing = made_of((0.0,) * 6, (1 / 6,) * 6)
    assert (nothing.rneg, nothing.outliers, nothing.alignment) == (0, 0, 0)
    assert nothing.ratios.tolist() == []
    below = made_of((-4.0, -2.0), (0.0, 0.0), ())
    assert below.trace.value == 0
    assert (below.rneg, below.outliers, below.alignment) == (math.inf, 0, 0)


def test_the_alignment_of_no_gradient_is_zero():
    nothing = torch.zeros(SIZE)
    assert made_of(gradient=nothing, gradient_along=nothing[:6]).alignment == 0


IN_SIZE, OUT_SIZE, SEEDS = 2**13, 2**8, 20
BULK = 0.5  # on average
ISOLATED = (-40.0, 30.0, 60.0, 100.0)
EXACT = [*ISOLATED, *torch.linspace(0, 2 * BULK, IN_SIZE - len(ISOLATED)).tolist()]


@pytest.fixture(scope="module")
def spectra():
    """One matrix, sketched with many seeds."""
    model = Quadratic(EXACT)
    return model, [
        hessian_spectrum(
            sketched(model, OUT_SIZE, seed),
            32,
            keep_vectors=4,
            seed=seed,
            progress=False,
        )
        for seed in range(SEEDS)
    ]


def isolated(spectrum):
    return torch.cat([spectrum.eigenvalues[:1], spectrum.eigenvalues[-3:]])


def test_eigenvalues_are_those_of_the_hessian_on_average(spectra):
    """The mean of 20 is within three of its errors.

    AFFD's columns are not quite independent: a bulk of c times the unit matrix becomes
    c S S.T, whose value along S v is N / D + 2, not N / D + 1: another c.
    """
    _, found = spectra
    mean = torch.stack([isolated(spectrum) for spectrum in found]).mean(0)
    for place, value in enumerate(ISOLATED):
        error = abs(value) * math.sqrt(2 / OUT_SIZE / SEEDS)
        assert abs(mean[place] - value) < 3 * error + BULK
    # Without the correction none would be.
    shift = sum(EXACT) / OUT_SIZE
    assert shift > 3 * 100 * math.sqrt(2 / OUT_SIZE / SEEDS) + 2


def test_the_standard_errors_of_eigenvalues_are_honest(spectra):
    _, found = spectra
    scores = torch.stack(
        [
            (isolated(spectrum) - torch.tensor(ISOLATED))
            / torch.cat([spectrum.standard_errors[:1], spectrum.standard_errors[-3:]])
            for spectrum in found
        ]
    )
    assert (scores.square().mean(0).sqrt() > 0.5).all()
    assert (scores.square().mean(0).sqrt() < 1.5).all()


def test_the_trace_is_that_of_the_hessian_within_its_error(spectra):
    _, found = spectra
    # tr(S H S.T) itself scatters around tr(H), with the variance 2 |H|^2 / D.
    scatter = 2 / OUT_SIZE * sum(value * value for value in EXACT)
    scores = [
        (spectrum.trace.value - sum(EXACT))
        / math.sqrt(spectrum.trace.standard_error**2 + scatter)
        for spectrum in found
    ]
    assert 0.5 < torch.tensor(scores).square().mean().sqrt() < 1.5
    assert abs(torch.tensor(scores).mean()) < 3 / math.sqrt(SEEDS)


def test_statistics_of_the_sketch_are_those_of_the_hessian(spectra):
    model, found = spectra
    exact_gradient = torch.autograd.grad(model(torch.zeros(1))["loss"], model.x)[0]
    directions = torch.stack([model.eigenvector(place) for place in (1, 2, 3)])
    share = (directions @ exact_gradient).square().sum() / exact_gradient.square().sum()
    outliers = [spectrum.outliers for spectrum in found]
    assert max(set(outliers), key=outliers.count) == 3
    three = [spectrum.alignment for spectrum in found if spectrum.outliers == 3]
    # An inner product of unit vectors has an error of sqrt(1 / D), three squares 3 / D.
    assert torch.tensor(three).mean() == pytest.approx(float(share), abs=0.1)
    rneg = torch.tensor([spectrum.rneg for spectrum in found])
    # Numerator and denominator scatter by sqrt(2 / D) each.
    assert rneg.mean() == pytest.approx(
        0.4, abs=3 * 0.4 * (4 / OUT_SIZE / SEEDS) ** 0.5
    )


def test_lifted_vectors_have_the_part_along_the_eigenvector_that_sketches_keep(spectra):
    """S.T S v has the part 1 along v, and the norm sqrt(N / D) of S.T on a unit vector.

    Nothing else sticks out: a random direction has a part of sqrt(1 / N).
    """
    model, found = spectra
    wanted = (IN_SIZE / OUT_SIZE + 2) ** -0.5
    for spectrum in found[:5]:
        for place, (vector,) in zip(
            (0, 1, 2, 3), map(dict.values, spectrum.lifted(range(4))), strict=True
        ):
            assert float(vector.norm()) == pytest.approx(1, 1e-5)
            # Eigenvectors of near eigenvalues mix by sqrt(1 / D) l / (l_i - l_j).
            along = abs(float(vector @ model.eigenvector(place)))
            assert along == pytest.approx(wanted, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthogonal_sketch_gives_eigenvalues_and_vectors_themselves(dtype):
    exact = [float(i * i - 20) for i in range(16)]
    model = Quadratic(exact, dtype)
    operator = sketched(model, 16, operator="srht")
    spectrum = hessian_spectrum(operator, 16, keep_vectors=16, progress=False)
    assert relative(spectrum.sketched, torch.tensor(sorted(exact)).double()) < 1e-5
    assert spectrum.trace.value == pytest.approx(sum(exact), 1e-5)
    assert spectrum.trace.standard_error < 1e-3
    assert spectrum.loss_of_orthogonality < 1e-5
    assert spectrum.loss == pytest.approx(float(model(torch.zeros(1))["loss"].detach()))
    order = sorted(range(16), key=exact.__getitem__)
    for place, lifted in zip(order, spectrum.lifted(range(16)), strict=True):
        assert abs(float(lifted["x"] @ model.eigenvector(place).float())) > 1 - 1e-5


def test_kept_vectors_are_those_of_the_largest_eigenvalues_by_size():
    model = Quadratic([-50.0, 30, 60, *torch.linspace(0, 1, 61)], torch.float64)
    operator = sketched(model, 64, operator="srht")
    spectrum = hessian_spectrum(operator, 40, keep_vectors=3, progress=False)
    steps = len(spectrum.sketched)
    assert spectrum.vector_places.tolist() == [0, steps - 2, steps - 1]
    for vector, place in zip(spectrum.vectors, spectrum.vector_places, strict=True):
        wanted = spectrum.sketched[place] * vector.double()
        assert relative(operator @ vector.double(), wanted) < 1e-5
    none = hessian_spectrum(operator, 40, keep_vectors=0, progress=False)
    assert none.vectors.shape == (0, 64)
    assert none.alignment == pytest.approx(spectrum.alignment)
    along = (spectrum.vectors.double() @ spectrum.gradient.double()).abs()
    kept = spectrum.gradient_along[spectrum.vector_places].abs()
    assert relative(along, kept) < 1e-5
    many = hessian_spectrum(operator, 4, keep_vectors=99, progress=False)
    assert many.vector_places.tolist() == [0, 1, 2, 3]


def test_a_basis_in_a_file_gives_the_same_bits(tmp_path):
    model = Quadratic(torch.linspace(-1, 5, 64).tolist())
    one = hessian_spectrum(sketched(model, 16), 8, progress=False)
    other = hessian_spectrum(
        sketched(model, 16), 8, progress=False, basis_file=tmp_path / "basis"
    )
    assert_equal(one, other)
