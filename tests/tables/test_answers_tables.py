"""The studies of surer and finer answers."""

import importlib.util

import pytest
import torch

from hf_sketch.recipes.tables.answers.several_trainings import (
    SeveralTrainingsArguments,
    coverage,
    gains,
    run_several_trainings,
)

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn has the digits"
)


@needs_digits
@pytest.mark.full
def test_the_study_of_several_trainings_runs_and_goes_on(tmp_path):
    arguments = SeveralTrainingsArguments(str(tmp_path), tiny=True)
    results = run_several_trainings(arguments)
    assert [*results["trainings"]["preconditioned"]] == [1, 3, 5]
    assert [*results["coverage"]] == [3, 5]
    assert run_several_trainings(arguments) == results


def noisy(trainings, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(*shape, **options), torch.randn(trainings, *shape, **options)


def test_means_of_more_trainings_come_nearer_to_the_truth():
    subsets = torch.rand(40, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    truth, noise = noisy(15, 8, 30)
    losses = -(truth @ subsets.double().T).T
    found = gains(truth + 2 * noise, subsets, losses)
    assert [len(found[count]["groups"]) for count in (1, 3, 5)] == [15, 5, 3]
    assert found[1]["lds"] < found[3]["lds"] < found[5]["lds"] < 1
    assert gains(truth.expand(5, -1, -1), subsets, losses)[5]["lds"] == pytest.approx(1)


def test_intervals_of_gaussian_trainings_hold_ninety_percent():
    truth, noise = noisy(150, 60, 20)
    found = coverage(truth + noise, truth.unsqueeze(1).repeat(1, 3, 1))
    for count in (3, 5):
        assert found[count]["truth"] == pytest.approx(0.9, abs=0.01)
        assert found[count]["truth_with_its_noise"] == found[count]["truth"]
        assert found[count]["other_trainings"] == pytest.approx(0.9, abs=0.02)
    apart = coverage(truth + noise, 5 + truth.unsqueeze(1).repeat(1, 3, 1))
    assert apart[3]["truth"] < 0.3
    assert apart[3]["other_trainings"] == found[3]["other_trainings"]
