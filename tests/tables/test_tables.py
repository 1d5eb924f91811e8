import json
from statistics import mean

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sketch.examples.measured_error import top_found
from hf_sketch.recipes.tables.costs.step_cost import (
    StepCostArguments,
    peak_extra_bytes,
    run_step_cost,
    timed,
)
from hf_sketch.recipes.tables.models import gradient_tasks
from hf_sketch.recipes.tables.models.gradient_tasks import GradientTask
from hf_sketch.recipes.tables.paper.table6 import (
    Table6Arguments,
    accuracy,
    least_bits,
    pearson_r,
    run_table6,
)
from tests.helpers.tiers import full
from tests.helpers.trained.recipe_runs import assert_saved
from tests.helpers.trained.saved_language_model import save_language_model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a tiny causal language model with a tokenizer."""
    return save_language_model(tmp_path_factory.mktemp("language-model"), 16)


@pytest.mark.parametrize(
    ("task", "sketches"),
    [
        *full(("snli", "grouped/srht"), ("masked", "grouped/srht")),
        ("causal", Table6Arguments.sketches),
    ],
    ids=["snli", "masked", "causal"],
)
def test_table_6_runs_and_saves(task, sketches, language_model, tmp_path, capsys):
    arguments = Table6Arguments(
        output_dir=str(tmp_path),
        task=task,
        model_name_or_path=language_model if task == "causal" else None,
        sketches=sketches,
        max_length=16,
        bits="8,11",
        examples=9,
        seeds=2,
        steps=1,
    )
    results = run_table6(arguments)
    assert_saved(tmp_path / f"table6_{task}.json", results)
    saved = json.loads((tmp_path / f"table6_{task}.json").read_text())
    assert saved["arguments"]["examples"] == 9
    printed = capsys.readouterr().out
    assert ("paper (10, 12, 14)" in printed) == ("ffd" in sketches)
    assert list(results) == sketches.split(",")
    for by_bits in results.values():
        fewer, more = by_bits[8], by_bits[11]
        assert all(len(values) == 2 for values in fewer.values())
        assert mean(more["rms_error"]) < mean(fewer["rms_error"])
        assert mean(more["pearson_r"]) > mean(fewer["pearson_r"])
        assert all(0 < share <= 1 for share in more["top_found"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "seq2seq"}, "task must be one of 'snli', .*, got 'seq2seq'"),
        ({"task": "causal"}, r"no model by default\. Pass --model_name_or_path"),
        ({"examples": 10**4}, r"have \d+ passages .* Pass --examples \d+, or a longer"),
    ],
    ids=["task", "model", "examples"],
)
def test_a_task_that_lacks_something_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        run_table6(Table6Arguments(**changed))


def test_exact_products_in_parts_are_those_of_all_gradients_at_once(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 8, "n_embd": 8, "n_layer": 1}
    ends = {"n_head": 2, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends))
    ids = torch.randint(50, (5, 1, 8))
    task = GradientTask(model.eval(), [{"input_ids": x, "labels": x} for x in ids])
    rows = torch.cat([torch.cat(list(g.values()), 1) for g in task.gradients(2)])
    assert rows.shape == (5, task.elements)
    for held_bytes in (2**31, 4 * task.elements * 2):
        monkeypatch.setattr(gradient_tasks, "_HELD_BYTES", held_bytes)
        torch.testing.assert_close(task.exact_products().float(), rows @ rows.T)
    loss = model(**task.examples[3]).loss
    parts = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(rows[3], torch.cat([p.flatten() for p in parts]))


def test_the_figures_of_table_6_are_those_of_the_definitions():
    rows = torch.tensor([[3.0, 0, 0], [0, 4, 0], [0, 0, 5], [1, 2, 2]])
    exact = (rows @ rows.T).double()
    sketched = rows + torch.tensor([[0, 0.3, 0.6], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    got = accuracy(exact, sketched)
    # Only pairs with row 0 are off: by 1.2 of 12, by 3 of 15 and by 1.8 of 9.
    assert got["rms_error"] == pytest.approx(((0.1**2 + 0.2**2 * 2) / 6) ** 0.5)
    assert got["top_found"] == 1
    assert top_found(exact, exact, 1) == 1
    turned = exact.clone()
    turned[0, 3], turned[0, 1] = turned[0, 1], turned[0, 3].clone()
    assert top_found(exact, turned, 1) == 0.75


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
    rs = {8: [0.96, 0.97, 0.9], 10: [0.94], 12: [0.97], 14: [0.999]}
    by_bits = {bits: {"pearson_r": values} for bits, values in rs.items()}
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
