import json

import pytest

from hf_sketch.recipes.tables.costs.process_cost import (
    ProcessCostArguments,
    run_process_cost,
)


@pytest.mark.full
def test_one_process_and_two_are_measured_in_turn(tmp_path, capsys):
    arguments = ProcessCostArguments(
        output_dir=str(tmp_path), out_size=64, steps=3, rounds=1, tiny=True
    )
    results = run_process_cost(arguments)
    path = tmp_path / "process_cost_tiny-llama.json"
    assert json.loads(path.read_text())["results"] == json.loads(json.dumps(results))
    assert set(results["seconds"]) == {1, 2}
    one, two = (
        run["recorded"] / run["plain"] for (run,) in results["seconds"].values()
    )
    assert results["ratio_of_overheads"] == pytest.approx(two / one)
    assert "2 processes: a step" in capsys.readouterr().out


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"shape must be one of .*, got 'huge'"):
        ProcessCostArguments(shape="huge")
    with pytest.raises(ValueError, match="steps must be at least 3, got 2: pass 3"):
        ProcessCostArguments(steps=2)
    with pytest.raises(ValueError, match="processes must be at least 2, got 1: pass 2"):
        ProcessCostArguments(processes=1)
