import json
import sys

import pytest

from hf_sketch.recipes.tables.costs.per_example_cost import (
    PLAIN,
    PerExampleCostArguments,
    fast_path_floor,
    run_per_example_cost,
)
from hf_sketch.recipes.tables.quality.recorded_runs import SHAPES, Setting


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cost_of_rows_is_measured_beside_plain_training(
    tmp_path, capsys, shape, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bergson", None)  # as if it were not installed
    arguments = PerExampleCostArguments(
        output_dir=str(tmp_path),
        shape=shape,
        runs="grouped,factored,blocked",
        out_size=64,
        steps=2,
        tiny=True,
    )
    results = run_per_example_cost(arguments)
    path = tmp_path / f"per_example_cost_{shape}.json"
    assert json.loads(path.read_text())["results"] == json.loads(json.dumps(results))
    assert set(results["runs"]) == {PLAIN, "grouped", "factored", "blocked"}
    plain = results["runs"][PLAIN]
    assert plain["ratio_to_plain"] == 1
    for name in ("grouped", "factored", "blocked"):
        run = results["runs"][name]
        ratio = run["median_seconds"] / plain["median_seconds"]
        assert run["ratio_to_plain"] == pytest.approx(ratio)  # of one round
        assert run["least_ratio"] <= run["ratio_to_plain"] <= run["greatest_ratio"]
        assert run["coverage"] == 1
        assert run["pearson_r"] == run["pearson_r_of_covered"]
        assert 0 < run["pearson_r"] <= 1
        assert run["numbers_in_a_row"] == 64
        assert run["row_bytes"] > 4 * 64
    printed = capsys.readouterr().out
    assert "the floor of 'grouped'" in printed
    assert "100.0%  r 0." in printed or "100.0%  r 1." in printed


def test_peers_that_are_not_installed_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = PerExampleCostArguments(
        output_dir=str(tmp_path), runs="bergson,dattri", steps=2, tiny=True
    )
    results = run_per_example_cost(arguments)
    assert set(results["runs"]) == {PLAIN}
    assert "bergson left out: bergson is not installed" in capsys.readouterr().out
    assert set(results["left_out"]) == {"bergson", "dattri"}


def test_the_floor_counts_what_the_layers_hold():
    setting = Setting.of_shape(SHAPES["gpt2-small"].tiny, 1)
    counts = fast_path_floor(setting.model, 64, tokens=10)
    width, vocabulary, layers = 64, 300, 2
    weights = layers * 12 * width**2
    assert counts["layers"] == 3 * 10 * (weights + vocabulary * width)
    sides = layers * (width + 3 * width + width + width + 2 * 5 * width)
    # The tied head is a layer and the embedding a look-up; the positions are one, too.
    assert counts["folded"] == 10 * (sides + vocabulary + width + width + width)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"shape": "gpt5"}, "shape must be one of .*, got 'gpt5'"),
        ({"runs": "grouped,logix"}, r"runs must be among .*, got \['logix'\]"),
        ({"steps": 1}, "steps must be at least 2.*got 1: pass --steps 4"),
    ],
)
def test_bad_arguments_are_named(bad, match):
    with pytest.raises(ValueError, match=match):
        PerExampleCostArguments(**bad)
