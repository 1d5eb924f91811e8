import pytest

from hf_sketch.recipes.tables.costs.plan_check import PlanCheckArguments, run_plan_check


@pytest.mark.full
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_plans_are_put_beside_measured_runs(tmp_path, capsys, model_type):
    arguments = PlanCheckArguments(
        output_dir=str(tmp_path), model_type=model_type, steps=4, tiny=True
    )
    results = run_plan_check(arguments)
    assert set(results) == {"tiny grouped", "tiny blocked"}
    for result in results.values():
        planned, measured = result["planned"], result["measured"]
        assert set(planned) == set(measured)
        for exact in ("row_bytes", "store_bytes"):
            assert planned[exact] == pytest.approx(measured[exact], rel=0.05)
        assert planned["sketch_seconds"] > 0
    grouped = results["tiny grouped"]
    planned, measured = (grouped[x]["extra_bytes"] for x in ("planned", "measured"))
    # Planned for an accelerator, which folds a whole batch at once, and after the peak.
    assert measured <= planned <= 10 * measured
    assert "sketch_seconds" in capsys.readouterr().out
