"""Statistics of a spectrum, from Ritz values that are given."""

import math

import pytest
import torch

from hf_sketch import ModelSketch
from tests.helpers.spectra import SIZE, VALUES, WIDE, made_of

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
    assert wanted[4][0] < alone - 25 / SIZE  # its neighbor pushed it outwards


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
