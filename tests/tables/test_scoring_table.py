import pytest
import torch

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


@pytest.mark.full
def test_rates_of_workers_are_compared(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datatrove")
    from hf_sketch.recipes.tables.costs.cluster_scoring import (
        ClusterScoringArguments,
        run_cluster_scoring,
    )

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    arguments = ClusterScoringArguments(
        output_dir=str(tmp_path / "out"), work_dir=str(tmp_path), tiny=True
    )
    try:
        results = run_cluster_scoring(arguments)
    finally:
        torch.set_num_threads(threads)
    assert results["rows"] == 4 * 4096
    one, two = (results["seconds"][n]["median_seconds"] for n in (1, 2))
    assert f"{one / two:.2f} times the rate of 1" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
