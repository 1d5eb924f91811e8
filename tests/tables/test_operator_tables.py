"""The tables of what operators cost: 2, 3, 4, 8 and 11, and Figures 3 and 4."""

import math
import re

import pytest
import torch

from hf_sketch.recipes.tables.measure import fitting_bits, peak_extra_bytes, timed
from hf_sketch.recipes.tables.models.language_model import random_language_model
from hf_sketch.recipes.tables.paper import table11
from hf_sketch.recipes.tables.paper.figures_3_4 import (
    Figures34Arguments,
    run_figures_3_4,
    save_plot,
)
from hf_sketch.recipes.tables.paper.table2 import (
    Table2Arguments,
    largest_rows,
    layer_groups,
    measure_group,
    project,
    run_table2,
)
from hf_sketch.recipes.tables.paper.table8 import Table8Arguments, run_table8
from hf_sketch.recipes.tables.paper.table11 import Table11Arguments, run_table11
from hf_sketch.recipes.tables.speed_ups import (
    PUBLISHED,
    PUBLISHED_SPEED_UPS,
    published_times,
    speed_ups,
)
from tests.helpers.trained.recipe_runs import assert_saved, make_absent


def assert_ordered(cost):
    parts = [cost[f"{which}_seconds"] for which in ("least", "median", "greatest")]
    assert parts == sorted(parts)
    assert parts[0] > 0


@pytest.mark.full
def test_table_2_runs_and_saves(tmp_path, capsys):
    results = run_table2(Table2Arguments(output_dir=str(tmp_path), tiny=True))
    assert_saved(tmp_path / "table2.json", results)
    for result in results.values():
        for which in ("pass", "product", "srht"):
            assert_ordered(result[which])
        assert 4 * result["rows"] * result["elements"] <= 2**23
        passes = math.ceil(2**12 / result["rows"])
        seconds = passes * result["pass"]["median_seconds"]
        assert result["dense_seconds"] == pytest.approx(seconds)
    printed = capsys.readouterr().out
    assert "paper k=32 31.2 ms, 3.99 s" in printed
    assert "paper k=128 24.4 ms, 0.78 s" in printed


@pytest.mark.full
def test_tables_3_4_and_8_run_and_save(tmp_path, capsys):
    saved = run_table8(Table8Arguments(output_dir=str(tmp_path), tiny=True))
    costs = {tuple(name.split("/")): cost for name, cost in saved["costs"].items()}
    not_ours = {row for row in PUBLISHED if row[::2] == ("ffd", "fft")}
    assert costs.keys() >= PUBLISHED.keys() - not_ours
    for cost in costs.values():
        assert_ordered(cost)
        assert cost["extra_peak_bytes"] > 0
    ratios = speed_ups({row: cost["median_seconds"] for row, cost in costs.items()})
    assert saved["speed_ups"] == {"/".join(key): r for key, r in ratios.items()}
    assert ratios.keys() >= PUBLISHED_SPEED_UPS.keys()
    printed = capsys.readouterr().out
    assert "paper 82 ms 1.7 GB | 64 ms 1.1 GB" in printed.split("Table 3")[0]
    assert "paper 82 ms 1.7 GB | 64 ms 1.1 GB" in printed.split("Table 3")[1]
    assert "paper 1.41 | 2.45" in printed.split("Table 4")[1]


@pytest.mark.full
def test_table_11_runs_and_saves_without_traker(tmp_path, capsys, monkeypatch):
    make_absent(monkeypatch, "trak")
    results = run_table11(Table11Arguments(output_dir=str(tmp_path), tiny=True))
    projections = results["projections"]
    assert projections.keys() == {
        "dense",
        "affd",
        "affd in blocks",
        "qk",
        "srht in blocks",
    }
    for name, costs in projections.items():
        beyond = results["extrapolated_seconds"].get(name, {})
        assert {6, 12} <= {*costs, *beyond} or not costs
        for cost in costs.values():
            assert_ordered(cost)
            ratio = cost["median_seconds"] / results["read"]["median_seconds"]
            assert cost["ratio_to_read"] == pytest.approx(ratio)
        for bits, seconds in beyond.items():
            last = costs[max(costs)]["median_seconds"]
            assert seconds == pytest.approx(last * 2 ** (bits - max(costs)))
    assert results["gradient_bytes"] == 4 * 2**13
    assert "traker: not installed, pip install traker" in results["left_out"]
    printed = capsys.readouterr().out
    for paper in ("AFFD 213 ms", "QK 84 ms", "left out: traker: not installed"):
        assert paper in printed


@pytest.mark.full
def test_figures_3_and_4_run_and_save_without_matplotlib(tmp_path, capsys, monkeypatch):
    make_absent(monkeypatch, "matplotlib")
    arguments = Figures34Arguments(output_dir=str(tmp_path), memory_gib=0.01, tiny=True)
    results = run_figures_3_4(arguments)
    costs = results["costs"]
    assert list(costs["afjl"]) == [6, 8, 10, 12, 14]
    assert list(costs["fjl"]) == [6, 8, 10, 12]
    for name, by_bits in costs.items():
        for cost in by_bits.values():
            assert_ordered(cost)
        first, *_, last = by_bits.values()
        growth = results["growth"][name]
        for part, figure in (
            ("time", "median_seconds"),
            ("memory", "extra_peak_bytes"),
        ):
            ratio = last[figure] / first[figure]
            assert growth[f"{part}_ratio"] == pytest.approx(ratio)
    # The largest FJL draws 2^12 rows of 16 entries, at 8 bytes each for the least.
    assert costs["fjl"][12]["extra_peak_bytes"] > 8 * 16 * 2**12
    printed = capsys.readouterr().out
    assert "left out: fjl 2^14: drawing its matrix takes 0.0146 GiB" in printed
    assert "beyond 2^20 it is out of memory" in printed
    assert "no plot: matplotlib is not installed" in printed
    assert not list(tmp_path.glob("*.png"))


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    cost = {"least_seconds": 1, "median_seconds": 2, "greatest_seconds": 3}
    by_bits = {bits: {**cost, "extra_peak_bytes": 2**bits} for bits in (4, 6)}
    save_plot(tmp_path / "plot.png", {"fjl": by_bits, "afjl": by_bits})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_projector_of_traker_is_a_dense_gaussian_matrix_drawn_in_blocks():
    pytest.importorskip("trak")
    in_size, out_size = 50, 16
    gradient = torch.randn(in_size, generator=torch.Generator().manual_seed(0))
    for columns, matrix_bytes in ((8, 2**20), (2, 4 * in_size * 2)):
        project = table11.traker_projection(in_size, matrix_bytes, out_size)
        blocks = [
            torch.empty(in_size, columns).normal_(
                generator=torch.Generator().manual_seed(1000 * block)
            )
            for block in range(out_size // columns)
        ]
        expected = gradient @ torch.cat(blocks, 1) / 4
        for _ in range(2):
            torch.testing.assert_close(project(gradient), expected)


def test_the_speed_ups_of_table_4_follow_from_the_times_of_table_8():
    for column, place in ((0, 0), (2, 1)):
        ratios = speed_ups(published_times(column))
        for key, figures in PUBLISHED_SPEED_UPS.items():
            assert ratios[key] == pytest.approx(figures[place], abs=0.011), key


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [("gpt2", "transformer.h"), ("bert", "bert.encoder.layer")],
)
def test_groups_are_the_token_embedding_and_each_block(model_type, blocks):
    model = random_language_model(model_type, tiny=True)
    groups = layer_groups(model)
    assert list(groups) == ["token embedding", f"{blocks}.0", f"{blocks}.1"]
    assert groups["token embedding"] == [model.get_input_embeddings().weight]
    for name in list(groups)[1:]:
        expected = list(model.get_submodule(name).parameters())
        assert len(groups[name]) == len(expected)
        assert all(a is b for a, b in zip(groups[name], expected, strict=True))


@pytest.mark.parametrize("memory_bytes", [2**12, 2**14, 10**5])
def test_the_largest_dense_projection_fits_and_twice_its_rows_do_not(memory_bytes):
    gradient = torch.ones(500)
    rows = largest_rows(gradient, memory_bytes)
    assert peak_extra_bytes(lambda: project(rows, gradient)) <= memory_bytes
    assert 2 * rows * gradient.nbytes > 0.9 * memory_bytes
    assert rows & (rows - 1) == 0


def test_too_little_memory_for_a_row_is_refused_with_a_fix_that_is_enough():
    gradient = torch.ones(10**6)
    with pytest.raises(ValueError, match=r"of 1000000 elements, got 0\.00097") as e:
        measure_group(gradient, 2**20, rounds=1)
    fix = re.search(r"pass --memory_gib (\S+) or more", str(e.value))
    assert largest_rows(gradient, int(float(fix[1]) * 2**30)) == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: run_table8(Table8Arguments(elements=1024, bits=11)),
            r"bits must be in \[0, 10\] for 1024 elements, got 11: pass --bits 10",
        ),
        (
            lambda: run_table11(Table11Arguments(elements=1024, bits="11,12")),
            r"in \[1, 10\] for 1024 elements, got '11,12': pass --bits 10",
        ),
        (
            lambda: run_figures_3_4(Figures34Arguments(elements=-1)),
            r"elements must be in .* got -1: pass --elements",
        ),
    ],
    ids=["table8", "table11", "figures_3_4"],
)
def test_sizes_that_do_not_fit_are_named(run, message, monkeypatch):
    tiny = random_language_model("gpt2", tiny=True)
    monkeypatch.setattr(
        "hf_sketch.recipes.tables.models.language_model.random_language_model",
        lambda model_type, tiny_too: tiny,
    )
    with pytest.raises(ValueError, match=message):
        run()


def test_sizes_above_the_number_of_elements_are_left_out():
    assert fitting_bits("12,3,10,0", 1024) == [3, 10]


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0: pass 1"):
        timed({}, 0)


@pytest.mark.parametrize(
    ("longest_seconds", "most", "expected"), [(0.05, 18, 5), (0.05, 4, 4), (1e-3, 9, 0)]
)
def test_a_dense_projection_is_tried_up_to_what_it_finishes_in_time(
    longest_seconds, most, expected, monkeypatch
):
    tried = []

    def make(out_size):
        tried.append(out_size)
        return lambda gradient: out_size * 1e-3

    monkeypatch.setattr(table11.timeit, "repeat", lambda use, number, repeat: [use()])
    gradient = torch.ones(1)
    bits = table11.most_bits_in_time(make, gradient, most, longest_seconds)
    assert bits == expected
    assert max(tried) == 2 ** max(expected, 1)
