import json
import math

import pytest
import torch

from hf_sketch.recipes.tables.adapters.methods import METHODS, adapted, trained
from hf_sketch.recipes.tables.adapters.subspace_peers import (
    SubspacePeersArguments,
    run_subspace_peers,
    tuned,
)
from hf_sketch.recipes.texts.minilm import new_model
from tests.helpers.tiers import full


@pytest.mark.parametrize(
    ("best", "rates"),
    [(0.01, 3), (0.09, 5), (0.01 / 27, 6), (1e9, 7)],
)
def test_a_rate_is_tuned_until_the_best_is_inside(best, rates):
    seen = []

    def loss(rate):
        seen.append(rate)
        return (math.log(rate) - math.log(best)) ** 2

    found = tuned(loss, 0.01)
    assert len(seen) == len(set(seen)) == rates
    assert found == pytest.approx(
        min(seen, key=lambda rate: abs(math.log(rate / best)))
    )


def test_a_rate_that_diverges_is_not_chosen():
    assert tuned(lambda rate: math.nan if rate > 0.01 else rate, 0.01) < 0.01


@pytest.mark.parametrize("method", ["affd", *full(*METHODS[1:])])
def test_adapters_train_as_many_parameters_as_asked(method):
    budget = 2**14
    model = adapted(method, budget, 0, lambda: new_model().float())
    head = sum(p.numel() for n, p in model.named_parameters() if "classifier" in n)
    assert budget / 2 < trained(model) <= budget
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    in_full = method in ("affd", "srht", "grouped", "qk")
    assert any("classifier" in name for name in names) != in_full
    assert head


def test_methods_without_such_an_adapter_are_left_out():
    assert adapted("lora", 2**8, 0, new_model) is None
    with pytest.raises(ValueError, match=r"method must be one of affd.*got 'dora'"):
        adapted("dora", 2**8, 0, new_model)


def test_a_small_run_is_saved_and_not_repeated(tmp_path, capsys):
    arguments = SubspacePeersArguments(output_dir=str(tmp_path), tiny=True)
    results = run_subspace_peers(arguments)
    assert set(results) == {"full", "affd 12", "lora 12", "bitfit 12"}
    for found in results.values():
        (run,) = found["runs"]
        assert 0 <= run["accuracy"] <= 1
    saved = json.loads((tmp_path / "subspace_peers_1.json").read_text())
    assert saved["results"] == results
    plot = (tmp_path / "subspace_peers_1.svg").read_text()
    assert all(f"<!-- {name} -->" in plot for name in ("affd", "lora", "bitfit"))
    torch.manual_seed(1)
    assert run_subspace_peers(arguments) == results
    assert "affd 12: 4,096 parameters" in capsys.readouterr().out
    arguments.methods = "full,affd,srht"
    more = run_subspace_peers(arguments)
    assert more == results | {"srht 12": more["srht 12"]}
    arguments.steps = 3
    with pytest.raises(ValueError, match=r"steps=2, not 3. Pass another --output_dir"):
        run_subspace_peers(arguments)


# EncoderDecoderModel warns of a change in 4.12 whenever it is given labels.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.full
def test_a_small_run_on_summaries_is_saved(tmp_path):
    arguments = SubspacePeersArguments(
        output_dir=str(tmp_path), tiny=True, task="xsum", methods="srht,lora"
    )
    results = run_subspace_peers(arguments)
    assert set(results) == {"srht 12", "lora 12"}
    assert results["srht 12"]["parameters"] == 2**12
    for found in results.values():
        (run,) = found["runs"]
        assert 0 <= run["accuracy"] <= 1
        assert 0 < run["test_loss"] < 2 * math.log(30522)  # of MiniLM's tokens
    assert "XSUM" in (tmp_path / "subspace_peers_xsum_1.svg").read_text()


def test_other_tasks_are_refused(tmp_path):
    arguments = SubspacePeersArguments(output_dir=str(tmp_path), task="squad")
    with pytest.raises(
        ValueError, match="task must be one of 'snli', 'xsum', got 'squad'"
    ):
        run_subspace_peers(arguments)
