import pytest
import torch

from hf_sketch.recipes.tables.costs import hvp_cost
from hf_sketch.recipes.tables.costs.hvp_cost import HvpCostArguments, run_hvp_cost
from hf_sketch.recipes.tables.paper.table1_eigenvalues import (
    Table1EigenvaluesArguments,
    fitted,
    run_table1_eigenvalues,
)
from hf_sketch.recipes.tables.paper.table7 import (
    Table7Arguments,
    least_bits,
    run_table7,
)
from hf_sketch.recipes.tables.paper.table9 import (
    Table9Arguments,
    cases_of,
    run_table9,
)


@pytest.mark.full
def test_table_7_runs_and_saves(tmp_path, capsys):
    arguments = Table7Arguments(
        str(tmp_path), "affd", "6", 1, 2, 3, seeds=1, examples=2, steps=1
    )
    results = run_table7(arguments)
    assert len(results["errors"]["affd"][6]["corrected"]) == 1
    assert "paper (9, 10, 10)" in capsys.readouterr().out


def test_the_least_size_is_that_from_which_on_the_error_stays_small():
    errors = {8: [0.01], 9: [0.3], 10: [0.04, 0.2, 0.01], 11: [0.03]}
    cells = {bits: {"corrected": values} for bits, values in errors.items()}
    assert least_bits(cells, 0.05) == 10
    assert least_bits(cells, 0.001) is None


@pytest.mark.full
def test_table_9_runs_and_saves_and_its_ways_agree(tmp_path):
    tiny = {"layers": 1, "width": 16, "tokens": 8, "bits": 6}
    cases = cases_of(Table9Arguments(str(tmp_path), **tiny))
    for name, (operator, use) in cases.items():
        algorithm, way, mix = name.split("/")
        exact = cases[f"{algorithm}/explicit/{mix}"][1](operator)
        tolerance = 1e-4 if way != "explicit, finite differences" else 1e-2
        got = use(operator)
        assert (got - exact).norm() < tolerance * exact.norm(), name
    costs = run_table9(Table9Arguments(str(tmp_path), tiny=True))
    assert set(costs) == set(cases)
    assert (tmp_path / "table9.json").exists()


@pytest.mark.full
def test_the_eigenvalues_of_layers_run_and_are_saved(tmp_path):
    arguments = Table1EigenvaluesArguments(str(tmp_path), 1, 2, 6, 2, 1)
    results = run_table1_eigenvalues(arguments)
    assert len(results["errors"]) == 8
    assert (tmp_path / "table1_eigenvalues.json").exists()


def test_the_fit_keeps_the_orientation():
    whole = torch.tensor([3.0, 2.0, 1.0]).double()
    assert torch.allclose(fitted(2 * whole - 5, whole), whole)
    assert torch.allclose(fitted(-whole, whole), whole.mean().expand(3))


@pytest.mark.full
def test_hvp_cost_runs_and_saves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hvp_cost, "PEERS", ())  # they need minutes
    results = run_hvp_cost(HvpCostArguments(str(tmp_path), tiny=True))
    assert results["products"]["autograd, plain"]["ratio_to_plain"] == 1
    assert results["products"]["finite_difference, affd"]["extra_peak_bytes"] > 0
    assert "hf_sketch, sketched" in results["eigenvalues"]
    assert "of a gradient's" in capsys.readouterr().out
