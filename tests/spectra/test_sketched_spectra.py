"""Spectra of sketched Hessians whose eigenvalues are known."""

import math

import pytest
import torch

from hf_sketch import hessian_spectrum
from tests.helpers.curvature_oracles import relative
from tests.helpers.spectra import Quadratic, assert_equal, sketched

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
