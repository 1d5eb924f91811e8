"""The studies of surer and finer answers."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from hf_sketch.recipes.tables.answers.certified import (
    CertifiedArguments,
    Truth,
    is_missing,
    run_certified,
)
from hf_sketch.recipes.tables.answers.planted_facts import (
    Documents,
    PlantedFactsArguments,
    run_planted_facts,
)
from hf_sketch.recipes.tables.answers.several_trainings import (
    SeveralTrainingsArguments,
    coverage,
    gains,
    run_several_trainings,
)

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn has the digits"
)


@needs_digits
@pytest.mark.full
def test_the_study_of_several_trainings_runs_and_goes_on(tmp_path):
    arguments = SeveralTrainingsArguments(str(tmp_path), tiny=True)
    results = run_several_trainings(arguments)
    assert [*results["trainings"]["preconditioned"]] == [1, 3, 5]
    assert [*results["coverage"]] == [3, 5]
    assert run_several_trainings(arguments) == results


@needs_digits
@pytest.mark.full
def test_the_study_of_certified_rows_runs(tmp_path):
    results = run_certified(CertifiedArguments(str(tmp_path), tiny=True))
    assert results["trials"] == 16
    assert results["missed"] == 0
    assert {line["method"] for line in results["lines"]} == {"dot", "cosine"}
    assert {line["layout"] for line in results["lines"]} == {"grouped", "blocked"}
    assert (tmp_path / "certified_digits.json").exists()


def test_the_truth_is_products_and_cosines_of_gradients_in_closed_form():
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return {"loss": (x @ self.weight).sum()}

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    collate = {"collate": lambda examples: {"x": torch.stack(examples)}}
    task = SimpleNamespace(rows=[*x[:5]], queries=[*x[5:]], **collate)
    truth = Truth.of(task, Line())
    torch.testing.assert_close(truth.dot, x[5:] @ x[:5].T)
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(truth.cosine, unit[5:] @ unit[:5].T)


def test_a_row_is_missing_if_a_greater_one_is_outside_and_no_equal_one():
    exact = torch.tensor([[3.0, 1.0, 2.0, 2.0]] * 4)
    ids = torch.tensor([[0, 2], [3, 0], [0, 1], [2, 3]])
    assert is_missing(exact, ids).tolist() == [False, False, True, True]


@pytest.mark.full
def test_the_study_of_planted_facts_runs(tmp_path):
    results = run_planted_facts(PlantedFactsArguments(str(tmp_path), tiny=True))
    (found,) = results["1"]
    assert all(off < 1e-5 for off in found["dot"]["off"])
    assert len(found["preconditioned"]["fact"]) == 2


def test_documents_say_their_fact_where_they_should():
    made = Documents.made(facts=5, repeats=2, words=4, seed=0)
    for number, document in enumerate(made.documents):
        question = made.questions[number % 5]
        assert document["fact"] == number % 5
        start = 1 + document["before"]
        fact = question["input_ids"][1:]
        assert document["input_ids"][start : start + len(fact)] == fact
        assert len(document["input_ids"]) == 1 + 4 + len(fact)
        (code,) = [label for label in question["labels"] if label != -100]
        assert made.tokenizer.convert_ids_to_tokens(code).startswith("code")
        assert document["input_ids"][document["before"] + 6] == code


def noisy(trainings, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(*shape, **options), torch.randn(trainings, *shape, **options)


def test_means_of_more_trainings_come_nearer_to_the_truth():
    subsets = torch.rand(40, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    truth, noise = noisy(15, 8, 30)
    losses = -(truth @ subsets.double().T).T
    found = gains(truth + 2 * noise, subsets, losses)
    assert [len(found[count]["groups"]) for count in (1, 3, 5)] == [15, 5, 3]
    assert found[1]["lds"] < found[3]["lds"] < found[5]["lds"] < 1
    assert gains(truth.expand(5, -1, -1), subsets, losses)[5]["lds"] == pytest.approx(1)


def test_intervals_of_gaussian_trainings_hold_ninety_percent():
    truth, noise = noisy(150, 60, 20)
    found = coverage(truth + noise, truth.unsqueeze(1).repeat(1, 3, 1))
    for count in (3, 5):
        assert found[count]["truth"] == pytest.approx(0.9, abs=0.01)
        assert found[count]["truth_with_its_noise"] == found[count]["truth"]
        assert found[count]["other_trainings"] == pytest.approx(0.9, abs=0.02)
    apart = coverage(truth + noise, 5 + truth.unsqueeze(1).repeat(1, 3, 1))
    assert apart[3]["truth"] < 0.3
    assert apart[3]["other_trainings"] == found[3]["other_trainings"]
