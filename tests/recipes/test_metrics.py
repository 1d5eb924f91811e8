"""The metric scripts against values worked out by hand."""

import pytest

from hf_sketch.recipes.dimension.metric_scripts import load_metric
from tests.helpers.trained.recipe_runs import make_absent


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A metric that asked the Hub would fail."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_accuracy_is_a_fraction():
    metric = load_metric("accuracy")
    got = metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert got == {"accuracy": 0.75}


def test_rouge_is_the_mean_of_f_measures_on_a_scale_of_100():
    # "the cat sat" against "the cat lay down": two words of 3 and of 4, one pair of 2
    # and of 3, a subsequence of 2. The second text has nothing in common.
    got = load_metric("rouge").compute(
        predictions=["the cat sat", "rain"], references=["the cat lay down", "sun"]
    )
    words = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    pairs = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    expected = {"rouge1": words, "rouge2": pairs, "rougeL": words}
    assert got == pytest.approx({name: 50 * f for name, f in expected.items()})


def test_the_longest_subsequence_keeps_the_order_of_words():
    got = load_metric("rouge").compute(
        predictions=["down the dog"], references=["the dog down"]
    )
    assert got["rouge1"] == pytest.approx(100)
    assert got["rougeL"] == pytest.approx(100 * 2 / 3)


def test_rouge_compares_stems_by_default():
    texts = {"predictions": ["running dogs"], "references": ["runs dog"]}
    metric = load_metric("rouge")
    assert metric.compute(**texts)["rouge1"] == pytest.approx(100)
    assert metric.compute(**texts, use_stemmer=False)["rouge1"] == 0


@pytest.mark.parametrize("package", ["evaluate", "rouge_score"])
def test_metrics_without_their_packages_name_the_extra(package, monkeypatch):
    make_absent(monkeypatch, package)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*hf-sketch\[recipes\]"):
        load_metric("accuracy")
