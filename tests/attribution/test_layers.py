"""Scores of groups of layers, against dense matrices."""

import numpy as np
import pytest
import torch

from hf_sketch import ModelSketch, SketchedHessian
from hf_sketch.curvature.hessian import HessianOperator
from tests.helpers.rows_in_memory import random_matrix, rows_of
from tests.helpers.trained.training import tiny_batch, tiny_bert

SIZE = 4
SKETCH = ModelSketch(
    (("a", (8, 4)), ("b", (8, 4)), ("c", (8, 4))), SIZE, groups=("a", "b", "c")
)
METHODS = ("dot", "cosine", "preconditioned")


def matrices(count, seed):
    """(count, groups, SIZE), groups of other sizes of gradients."""
    numbers = torch.cat([random_matrix(count, seed + i) for i in range(3)], 1)
    return numbers.view(count, 3, SIZE) * torch.tensor([1.0, 30.0, 0.02])[:, None]


def store_of(numbers, **columns):
    return rows_of(numbers.flatten(1), SKETCH, **columns)


def each_group(queries, rows, method, damping=1.0):
    """What each group adds to q M r, (groups, queries, rows)."""
    q, r = queries.double().numpy(), rows.double().numpy()
    found = []
    for group in range(3):
        left, right = q[:, group], r[:, group]
        if method == "preconditioned":
            c = right.T @ right / len(right)
            added = damping * np.trace(c) / len(right)  # each row is an example
            left = left @ np.linalg.inv(c + added * np.eye(SIZE))
        found.append(left @ right.T)
    return np.stack(found)


def squares(numbers):
    return numbers.double().square().sum(2).numpy().T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layers", "weights"),
    [
        (None, (1, 1, 1)),
        (["a", "b", "c"], (1, 1, 1)),
        ("c", (0, 0, 1)),
        (["a", "c"], (1, 0, 1)),
        ({"a": 2.5, "c": 1000}, (2.5, 0, 1000)),
    ],
    ids=str,
)
def test_scores_are_weighted_sums_over_the_groups(method, layers, weights):
    rows, queries = matrices(30, 0), matrices(5, 10)
    weights = np.array(weights)
    expected = np.tensordot(weights, each_group(queries, rows, method), 1)
    if method == "cosine":
        left, right = (np.sqrt(weights @ squares(x)) for x in (queries, rows))
        expected = expected / left[:, None] / right
    store = store_of(rows)
    got = store.scores(store_of(queries), method, layers=layers).numpy()
    assert got == pytest.approx(expected, rel=2e-5, abs=1e-6 * np.abs(expected).max())
    own = np.tensordot(weights, each_group(rows, rows, method), 1).diagonal()
    if method == "cosine":
        own = np.ones(30)
    got = store.self_influence(method, layers).numpy()
    assert got == pytest.approx(own, rel=2e-5)


def test_all_layers_give_the_scores_of_no_choice():
    store, queries = store_of(matrices(9, 0)), store_of(matrices(2, 5))
    for method in METHODS:
        expected = store.scores(queries, method)
        got = store.scores(queries, method, layers=["c", "b", "a"])
        assert torch.equal(got, expected)


def test_lines_and_sums_are_of_the_chosen_layers():
    rows, queries = matrices(12, 0), matrices(2, 5)
    store = store_of(rows, label=["x", "y"] * 6)
    lines = store.attribute(store_of(queries), 1, "dot", layers="c")
    expected = each_group(queries, rows, "dot")[2]
    assert lines["example_id"][:] == (100 + expected.argmax(1)).tolist()
    assert (
        lines["example_id"][:]
        != (100 + each_group(queries, rows, "dot").sum(0).argmax(1)).tolist()
    )
    sums = store.scores(store_of(queries), "dot", groups="label", layers={"c": 2})
    by_label = 2 * np.stack([expected[:, i::2].sum(1) for i in (0, 1)], 1)
    assert sums.numpy() == pytest.approx(by_label, rel=1e-5)


def test_the_preconditioner_has_a_block_for_each_group():
    rows = matrices(30, 0)
    method = store_of(rows).preconditioned(0.3)
    assert method.covariance.shape == (3, SIZE, SIZE)
    for block, numbers in zip(method.covariance, rows.double().unbind(1), strict=True):
        expected = numbers.T @ numbers / 30
        torch.testing.assert_close(block, expected, rtol=1e-5, atol=0)
    queries = matrices(4, 7)
    expected = each_group(queries, rows, "preconditioned", 0.3).sum(0)
    got = store_of(rows).scores(store_of(queries), method).numpy()
    assert got == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_a_group_without_gradients_adds_nothing():
    rows, queries = matrices(30, 0), matrices(4, 7)
    rows[:, 1] = queries[:, 1] = 0
    expected = each_group(queries, rows, "dot")[[0, 2]].sum(0)
    got = store_of(rows).scores(store_of(queries), "dot", layers=["a", "b", "c"])
    assert got.numpy() == pytest.approx(expected, rel=1e-5)
    scores = store_of(rows).scores(store_of(queries), "preconditioned")
    assert scores.isfinite().all()
    assert (
        not store_of(rows).scores(store_of(queries), "preconditioned", layers="b").any()
    )


def test_unknown_layers_are_named():
    store, queries = store_of(matrices(9, 0)), store_of(matrices(2, 5))
    known = r"layers must be some of \['a', 'b', 'c'\], got"
    with pytest.raises(ValueError, match=rf"{known} \['d'\]: pass names"):
        store.attribute(queries, layers=["a", "d"])
    with pytest.raises(ValueError, match=rf"{known} \{{\}}: pass names"):
        store.scores(queries, layers=[])
    with pytest.raises(
        ValueError, match=r"weight of 'a' must be a finite number of at"
    ):
        store.self_influence(layers={"a": -1})
    plain = rows_of(random_matrix(3, 0))
    with pytest.raises(ValueError, match=r"layers needs rows with groups of layers"):
        plain.attribute(plain, layers=["a"])


def test_a_spectrum_of_groups_is_refused():
    model = tiny_bert()
    hessian = HessianOperator(model, [tiny_batch()])
    sketch = ModelSketch.from_model(model, 64, groups=2)
    with pytest.raises(ValueError, match=r"one sketch of all layers, got groups of"):
        SketchedHessian(hessian, sketch)
