import pytest

from hf_sketch.recipes.tables.costs.scoring import ScoringArguments, run_scoring


@pytest.mark.full
def test_scoring_is_measured_beside_its_floors(tmp_path, capsys):
    arguments = ScoringArguments(
        output_dir=str(tmp_path / "out"), work_dir=str(tmp_path), tiny=True
    )
    results = run_scoring(arguments)
    assert results["rows"] == 4096
    assert results["bytes"] > 2 * 4096 * 64
    floor = max(results[n]["median_seconds"] for n in ("reading", "product"))
    ratio = results["scoring"]["median_seconds"] / floor
    assert results["ratio_to_the_larger_floor"] == pytest.approx(ratio)  # of one round
    assert "times the larger" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
