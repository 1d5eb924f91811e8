"""The study of bad batches that a guard finds."""

import json

import numpy as np

from hf_sketch.recipes.tables.training.guard import (
    GuardArguments,
    run_guard,
)
from hf_sketch.recipes.tables.training.guard_summary import summary


def test_the_study_of_a_guard_runs(tmp_path):
    results = run_guard(GuardArguments(str(tmp_path), tiny=True))
    assert results["runs"] == 1
    assert set(results["loss"]["3"]["found"]) == {
        "guarded facts contradicted",
        "in a quarter of the documents",
    }
    saved = json.loads((tmp_path / "guard_facts.json").read_text())
    assert saved["results"]["good_steps"] == results["good_steps"] == 22 - 2


def test_found_steps_and_false_alarms_are_counted_by_kind():
    """Of 100 good steps one is at 9, so that 1% lie above the 99th percentile."""
    values = np.array([np.nan, 9.0, *[0.0] * 99, 5.0, 3.5, 1.0])
    kinds = np.array(["bad", *[""] * 100, "bad", "bad", "worse"], dtype=object)
    names = ("opposition", "loss", "gradient_norm")
    run = {"kinds": kinds, "deviations": dict.fromkeys(names, values)}
    run |= {"named": [{"part_of_bad": 0.5, "part_of_named": 1.0}], "cost": 0.01}
    found = summary([run])
    assert found["good_steps"] == 100
    assert found["loss"]["4"]["false_alarms"][0] == 0.01
    assert found["loss"]["4"]["found"]["bad"][0] == 0.5
    assert found["loss"]["3"]["found"]["bad"][0] == 1
    assert found["guard"]["5"]["found"]["bad"][0] == 0
    assert found["gradient_norm"]["at 1%"]["found"]["worse"][0] == 1
    assert found["part_of_bad"] == 0.5
