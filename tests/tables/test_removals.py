"""The study of removals: what it removes, and how it counts."""

import importlib.util

import pytest
import torch

from hf_sketch.recipes.tables.quality.removals import (
    Changes,
    RemovalsArguments,
    removed_sets,
    run_removals,
)

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn has the digits"
)


@needs_digits
@pytest.mark.full
def test_the_study_runs_saves_and_goes_on(tmp_path, capsys):
    arguments = RemovalsArguments(str(tmp_path), tiny=True)
    results = run_removals(arguments)
    assert (tmp_path / "removals_digits.json").exists()
    assert results["all"]["removals"] == 9
    assert "9 removals" in capsys.readouterr().out
    assert run_removals(arguments) == results


def test_removed_sets_grow_and_are_of_three_kinds():
    labels = torch.arange(1000) % 4
    scores = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    sets = removed_sets(scores, labels, 30)
    sizes = [len(some) for some in sets]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 300)
    assert all(len(some.unique()) == len(some) for some in sets)
    of_label = labels[sets[16]]
    assert (of_label == of_label[0]).all()
    strongest = scores[17 // 3 % 5].topk(len(sets[17])).indices
    assert set(sets[17].tolist()) == set(strongest.tolist())


def test_coverage_counts_truths_within_the_intervals():
    estimates = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    truths = torch.tensor([[0.5, 3.0, 0.2], [2.0, 0.0, 2.0]], dtype=torch.float64)
    halves, noise = torch.ones(2, 3), torch.ones(2, 3)
    found = Changes(estimates, halves, truths, noise)
    everything = torch.tensor([True, True])
    # Of queries 0.5, 2, 2 and 0 away; noise widens 1 to (1 + 1.645^2)^(1/2) = 1.93.
    assert found.coverage(everything, noise=False) == {"queries": 0.5, "mean": 1}
    assert found.coverage(everything) == {"queries": 0.5, "mean": 1}
    wide = Changes(estimates, halves, truths, 2 * noise)
    assert wide.coverage(everything) == {"queries": 1, "mean": 1}
    assert wide.coverage(torch.tensor([False, True]), noise=False)["queries"] == 0.5
