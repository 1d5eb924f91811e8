"""Small runs of the tables on training: its ledger, and its noise."""

import pytest

from hf_sketch.recipes.tables.training.ledger import LedgerArguments, run_ledger
from hf_sketch.recipes.tables.training.noise_sweep import (
    NoiseSweepArguments,
    SweepTask,
    run_noise_sweep,
    steps_to,
)


def test_a_small_ledger_balances_and_shows_what_was_altered(tmp_path):
    results = run_ledger(LedgerArguments(output_dir=str(tmp_path), tiny=True))
    assert (tmp_path / "ledger.json").exists()
    assert (tmp_path / "ledger_cost.json").exists()
    assert [run["dtype"] for run in results["residuals"]] == ["float32", "bfloat16"]
    assert all(run["residual"] < 1e-6 for run in results["residuals"])
    assert not any(run["problems"] for run in results["residuals"])
    assert all(trial["located"] for trial in results["trials"])
    assert all(nudge["located"] for nudge in results["nudges"])
    assert results["false_alarms"] == 0
    assert results["bit_equal"]


def test_a_small_sweep_finds_the_fewest_steps_of_each_batch(tmp_path):
    arguments = NoiseSweepArguments(output_dir=str(tmp_path), tiny=True)
    (found,) = run_noise_sweep(arguments).values()
    assert (tmp_path / "noise_sweep_digits.json").exists()
    steps = {batch: best["steps"] for batch, best in found["best"].items()}
    assert steps.keys() == {16, 64}
    fewest = min(batch * count for batch, count in steps.items())
    assert found["critical_batch"] == fewest / min(steps.values())
    for best in found["best"].values():
        tried = dict(best["tried"])
        assert best["steps"] == tried[best["rate"]] == min(filter(None, tried.values()))
    noise, signal, ratio = found["exact"]["start"]["exact"]
    assert ratio == pytest.approx(noise / signal)
    assert found["exact"]["start"]["found"][0] == pytest.approx(noise, rel=0.2)


def test_a_rate_that_diverges_reaches_nothing():
    task = SweepTask.of_name("digits", 64)
    assert steps_to(task, task.new_model(), 16, 1e4, 0, 50) is None
