"""What the page says of the course of training."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_sketch.report.training import examples_table, loss_ends, spikes_table


def test_examples_that_are_only_mentioned_come_along():
    rows = {"example_id": [4, 7, 4], "loss": [1.0, 5.0, 3.0], "step": [1, 1, 2]}
    store = SimpleNamespace(dataset=Dataset.from_dict(rows))
    worst, other = examples_table(store, {4: "a text"})
    assert worst == worst | {"example_id": 7, "first": 5, "last": 5, "text": None}
    assert other == other | {"example_id": 4, "first": 1, "last": 3, "rows": 2}
    assert other["text"] == "a text"
    many = {"example_id": range(300), "loss": [float(i) for i in range(300)]}
    many |= {"step": [1] * 300}
    store = SimpleNamespace(dataset=Dataset.from_dict(many))
    found = [row["example_id"] for row in examples_table(store, {17: None})]
    assert found == [*range(299, 199, -1), 17]


def test_the_ends_of_the_loss_are_means_over_a_20th_of_the_steps():
    steps = [step for step in range(1, 101) for _ in range(2)]
    losses = [200.0 - step for step in steps[:-1]] + [float("nan")]
    rows = {"step": steps, "loss": losses}
    store = SimpleNamespace(dataset=Dataset.from_dict(rows))
    last = [104, 104, 103, 103, 102, 102, 101, 101, 100]
    assert loss_ends(store) == pytest.approx((197, sum(last) / len(last)))
    rows["loss"] = [float("nan")] * len(steps)
    assert loss_ends(SimpleNamespace(dataset=Dataset.from_dict(rows))) is None


def test_spikes_have_their_strongest_examples():
    lines = {"step": [9, 9, 9, 9, 9, 9, 4], "example_id": [*range(7)]}
    lines |= {"share": [0.5, 0.2, 0.1, 0.1, 0.05, 0.05, float("nan")]}
    lines |= {"loss_deviation": [9.0] * 6 + [float("nan")]}
    lines |= {"norm_deviation": [12.0] * 6 + [float("inf")]}
    store = SimpleNamespace(
        dataset=Dataset.from_dict({"step": [4, 9]}),
        steps=Dataset.from_dict({"step": [4, 9]}),
        find_spikes=lambda: Dataset.from_dict(lines),
    )
    first, second = spikes_table(store)
    assert (first["step"], second["step"]) == (4, 9)
    assert second["named"] == list(zip(range(5), lines["share"], strict=False))
    assert (second["more"], second["height"]) == (1, 12)
    store.steps = Dataset.from_dict({"step": [4, 4]})  # of two runs
    assert spikes_table(store) is None
