import importlib.util
import json

import pytest
import torch
from torch import nn

from hf_sketch.attribution.evaluation import random_subsets, retrain_on_subsets
from hf_sketch.recipes.setups import snli_setup
from hf_sketch.recipes.tables.models.exact_products import REST, exact_products
from hf_sketch.recipes.tables.paper.saved_losses import SavedLosses
from hf_sketch.recipes.tables.quality.lds import (
    LdsArguments,
    best_by_size,
    kept,
    run_lds,
    settled,
    task_of,
)
from hf_sketch.recipes.tables.quality.lds_methods import Row, fisher_influence
from hf_sketch.recipes.tables.quality.lds_tasks import (
    Digits,
    Snli,
    SnliHead,
    embedded_pairs,
)
from tests.helpers.trained.saved_language_model import save_language_model

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn has the digits"
)


@needs_digits
@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the other packages
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_study_of_digits_runs_and_saves(tmp_path, capsys):
    results = run_lds(LdsArguments(str(tmp_path), tiny=True))
    methods = {line["method"] for line in results["lines"]}
    ours = {"dot", "cosine", "preconditioned", "influence", "tracin"}
    ours |= {"preconditioned, last state", "tracin over the run"}
    exact = {"exact dot", "exact cosine", "exact preconditioned, last state"}
    exact |= {"same label"}
    assert ours | exact <= methods
    peers = {"traker": {"traker TRAK"}, "dattri": {"dattri TRAK", "dattri TracIn"}}
    theirs = [peers[name] for name in results["peers"]]
    assert methods == (ours | exact).union(*theirs)
    assert all(-1 <= lds <= 1 for line in results["lines"] for lds in line["lds"])
    printed = capsys.readouterr().out
    assert "best at D = 128: " in printed
    assert "% of exact" in printed


@pytest.mark.full
def test_the_study_of_snli_runs_without_others_and_goes_on(tmp_path):
    arguments = LdsArguments(str(tmp_path), task="snli", tiny=True)
    results = run_lds(arguments)
    assert not any("TRAK" in line["method"] for line in results["lines"])
    losses = json.loads((tmp_path / "lds_snli_losses.json").read_text())["losses"]
    assert len(losses) == 4
    task = Snli(24, 3, 1, num_hidden_layers=1)
    rows = random_subsets(4, 24)[2].nonzero().squeeze(1)
    again = task.losses(task.train(rows, 0)[-1].model).tolist()
    assert pytest.approx(again, rel=1e-5) == [*losses.values()][2]


@pytest.mark.full
def test_the_study_of_a_frozen_encoder_divides_rows_among_groups(tmp_path):
    options = {"out_sizes": "64", "groups": "1,2", "tiny": True}
    results = run_lds(LdsArguments(str(tmp_path), "snli_head", **options))
    lines = {
        (line["method"], line["out_size"], line["groups"]) for line in results["lines"]
    }
    for method in ("dot", "cosine", "preconditioned", "tracin"):
        assert {(method, 64, 1), (method, 64, 2)} <= lines
    assert ("influence", 64, 2) not in lines
    assert ("exact preconditioned, last state", None, 1) in lines


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A language model's folder and files of short texts."""
    directory = tmp_path_factory.mktemp("language")
    save_language_model(directory / "model", 8)
    for name, count in (("train", 24), ("asked", 3)):
        rain = [" and rain" * (i % 3) for i in range(count)]
        texts = [f"day {i} has {i * i} clouds{rain[i]}" for i in range(count)]
        (directory / f"{name}.txt").write_text("\n".join(texts))
    options = {"model_name_or_path": "model", "train_file": "train.txt"}
    options["validation_file"] = "asked.txt"
    return {name: str(directory / file) for name, file in options.items()}


@pytest.mark.full
def test_the_study_of_a_language_model_runs(tmp_path, language):
    results = run_lds(LdsArguments(str(tmp_path), "language", tiny=True, **language))
    methods = {line["method"] for line in results["lines"]}
    assert {"preconditioned", "dot", "tracin over the run"} <= methods
    assert "same label" not in methods
    assert 9 < results["mean_loss"] < 11  # log(30522) before training


def test_a_language_models_losses_are_means_over_each_texts_tokens(language):
    sizes = {"rows": 4, "queries": 3}
    task = task_of(LdsArguments("", "language", **sizes, **language))
    model = task.new_model().eval()
    own = [model(**task.collate([row])).loss for row in task.queries]
    torch.testing.assert_close(task.losses(model), torch.stack(own))
    with pytest.raises(ValueError, match="must have 40 texts, got 24: pass fewer"):
        task_of(LdsArguments("", "language", rows=40, queries=3, **language))
    with pytest.raises(ValueError, match="needs --model_name_or_path"):
        task_of(LdsArguments("", "language"))


def test_features_of_a_frozen_encoder_are_those_of_single_sentences():
    setup = snli_setup(None, None, True, max_samples=3, num_hidden_layers=1)
    pairs = setup.train_dataset
    for row, found in zip(pairs, embedded_pairs(setup, pairs), strict=True):
        sides = []
        for name in ("premise", "hypothesis"):
            inputs = setup.tokenizer(row[name], return_tensors="pt")
            with torch.no_grad():
                states = setup.model.base_model.eval()(**inputs).last_hidden_state
            mean = states[0].mean(0)
            sides.append(mean / mean.norm())
        u, v = sides
        expected = torch.cat([u, v, (u - v).abs(), u * v]) * len(u) ** 0.5
        torch.testing.assert_close(found["x"], expected, rtol=1e-4, atol=1e-5)
        assert int(found["labels"]) == row["label"]


def test_a_head_trains_on_what_a_frozen_encoder_gave():
    task = SnliHead(rows=8, queries=3, epochs=1, num_hidden_layers=1)
    (before, after) = task.train(torch.arange(8), 0, epochs=(0,))
    assert task.losses(after.model).shape == (3,)
    assert not torch.equal(task.losses(before.model), task.losses(after.model))


def test_settings_that_are_given_stay_those_of_a_smaller_task():
    assert settled(LdsArguments(task="snli")).subsets == 50
    assert settled(LdsArguments(task="snli", subsets=7)).subsets == 7
    with pytest.raises(ValueError, match=r"snli_head, snli, language, got 'mnist':"):
        settled(LdsArguments(task="mnist"))


def test_an_interrupted_retraining_goes_on_where_it_stopped(tmp_path):
    done: list[int] = []

    def train(rows, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(seed)
        return rows.float()[:2] + seed

    subsets = random_subsets(2, 8)
    path = tmp_path / "losses.json"
    with pytest.raises(KeyboardInterrupt):
        retrain_on_subsets(SavedLosses(path, {"rows": 8}, train), subsets, seeds=2)
    assert len(done) == 3
    done[:] = done[:1]
    found = retrain_on_subsets(SavedLosses(path, {"rows": 8}, train), subsets, 2)
    assert len(done) == 2  # only the one that was missing
    expected = torch.stack([s.nonzero().squeeze(1)[:2] + 0.5 for s in subsets])
    assert torch.equal(found, expected.double())
    with pytest.raises(ValueError, match=r"'rows': 9.*'rows': 8.*another --output_dir"):
        SavedLosses(path, {"rows": 9}, train)


def test_exact_influence_of_products_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    rows, queries = torch.randn(5, 9).double(), torch.randn(3, 9).double()
    covariance = rows.T @ rows / 5
    damped = covariance + 0.5 * covariance.trace() / 5 * torch.eye(9)
    expected = queries @ torch.linalg.solve(damped, rows.T)
    found = fisher_influence(queries @ rows.T, rows @ rows.T, 0.5)
    assert torch.allclose(found, expected)


class Quadratic(nn.Module):
    """Half the squared output: its gradient has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return {"loss": self.second(self.first(x)).square().mean() / 2}


def test_products_of_parts_are_those_of_gradients_in_closed_form():
    torch.manual_seed(0)
    model = Quadratic().double()
    rows, queries = torch.randn(6, 3).double(), torch.randn(2, 3).double()

    def collate(examples):
        return {"x": torch.stack(examples)}

    found = exact_products(model, rows, queries, collate, {"head": "second."})

    def gradient(x):
        hidden = model.first(x)
        output = model.second(hidden)
        first = output * model.second.weight.T
        return torch.cat([(first * x).flatten(), first.flatten()]), output * hidden

    for part, name in enumerate((REST, "head")):
        left = torch.stack([gradient(x)[part] for x in queries])
        right = torch.stack([gradient(x)[part] for x in rows])
        assert torch.allclose(found[name], left @ right.T)


def test_what_is_kept_is_reported_for_those_with_an_exact_counterpart():
    found = {
        Row("exact dot"): [0.5],
        Row("exact preconditioned", None, 1.0): [0.8],
        Row("dot", 8): [0.3, 0.2],
        Row("preconditioned", 8, 1.0): [0.3],
        Row("preconditioned", 16, 1.0): [0.6],
        Row("preconditioned", 16, 1.0, 2): [0.5],
        Row("dattri TRAK", 16, 0.0): [0.7],
        Row("traker TRAK", 16, 0.0): [0.1],
    }
    parts = {row: round(part, 6) for row, part in kept(found).items()}
    assert parts == {
        Row("dot", 8): 0.5,
        Row("preconditioned", 8, 1.0): 0.375,
        Row("preconditioned", 16, 1.0): 0.75,
    }
    assert best_by_size(found) == {
        8: {"ours": Row("preconditioned", 8, 1.0)},
        16: {
            "ours": Row("preconditioned", 16, 1.0),
            "others": Row("dattri TRAK", 16, 0.0),
        },
    }


def test_digits_without_their_package_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"none installed: call pip install"):
        Digits(rows=4, queries=1, epochs=1)


@needs_digits
@pytest.mark.full
def test_packages_that_are_not_there_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sketch.recipes.tables.quality.lds.installed", dict)
    monkeypatch.setattr("hf_sketch.recipes.tables.quality.lds_peers.installed", dict)
    results = run_lds(LdsArguments(str(tmp_path), tiny=True))
    assert results["peers"] == {}
    assert not any("TRAK" in line["method"] for line in results["lines"])


@needs_digits
def test_the_moments_of_a_training_are_those_of_shorter_ones():
    task = Digits(rows=40, queries=4, epochs=2)
    before, between, after = task.train(torch.arange(40), 0, epochs=(0, 1))
    assert {m.learning_rate for m in (before, between, after)} == {0.1}
    torch.manual_seed(0)
    first = task.new_model().state_dict()
    assert all(torch.equal(first[n], p) for n, p in before.model.state_dict().items())
    once = Digits(rows=40, queries=4, epochs=1).train(torch.arange(40), 0)[-1]
    assert torch.equal(task.losses(between.model), task.losses(once.model))
    assert not torch.equal(task.losses(after.model), task.losses(between.model))
    assert not set(map(str, task.rows)) & set(map(str, task.queries))
