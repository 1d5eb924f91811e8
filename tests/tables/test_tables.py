import json

import pytest
import torch

from hf_sketch.recipes.tables.costs.step_cost import (
    StepCostArguments,
    peak_extra_bytes,
    run_step_cost,
    timed,
)
from hf_sketch.recipes.tables.paper.table6 import (
    Table6Arguments,
    least_bits,
    pearson_r,
    run_table6,
)


@pytest.mark.full
def test_table_6_runs_and_saves(tmp_path, capsys):
    arguments = Table6Arguments(
        output_dir=str(tmp_path), bits="6,10", examples=6, seeds=1, steps=1
    )
    results = run_table6(arguments)
    saved = json.loads((tmp_path / "table6.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["arguments"]["examples"] == 6
    assert saved["results"]["blocked/srht"]["10"] == results["blocked/srht"][10]
    printed = capsys.readouterr().out
    assert "blocked/affd" in printed
    assert "paper (10, 12, 13)" in printed
    for by_bits in results.values():
        assert all(-1 <= r <= 1 for rs in by_bits.values() for r in rs)


@pytest.mark.full
def test_step_cost_runs_and_saves(tmp_path, capsys):
    arguments = StepCostArguments(output_dir=str(tmp_path), bits="8,12", tiny=True)
    results = run_step_cost(arguments)
    assert results["adamw"]["ratio_to_adamw"] == 1
    assert set(results) == {
        "adamw",
        "read",
        *(
            f"{name.partition(':')[0]} 2^{bits}"
            for name in arguments.sketches.split(",")
            for bits in ((12,) if ":" in name else (8, 12))
        ),
    }
    assert "the floor is one read" in capsys.readouterr().out


def test_pearson_r_of_exact_products_is_one():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert pearson_r(rows @ rows.T, 3 * rows) == pytest.approx(1, abs=1e-6)
    signs = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert abs(pearson_r(rows @ rows.T, signs)) < 0.9


def test_the_least_size_is_the_one_from_which_on_r_is_enough():
    by_bits = {8: [0.96, 0.97, 0.9], 10: [0.94], 12: [0.97], 14: [0.999]}
    assert least_bits(by_bits, 0.95) == 12
    assert least_bits(by_bits, 0.99) == 14
    assert least_bits(by_bits, 0.9999) is None


def test_the_peak_counts_what_is_held_at_once():
    def twice():
        for _ in range(2):
            torch.ones(2**18)

    def both():
        return torch.ones(2**18), torch.ones(2**18)

    assert 2**20 <= peak_extra_bytes(twice) < 1.5 * 2**20
    assert 2**21 <= peak_extra_bytes(both) < 2.5 * 2**20


def test_every_action_is_timed_in_every_round_but_the_first():
    calls = []
    seconds = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "a", "b", "b"] * 4
    assert [len(seconds[name]) for name in ("a", "b")] == [3, 3]
