"""Scores averaged over several trainings."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_sketch import combine_scores
from tests.helpers.rows_in_memory import random_matrix, rows_of

TRAININGS, ROWS, QUERIES = 3, 7, 2


def stores(count=ROWS):
    return [rows_of(random_matrix(count, seed)) for seed in range(TRAININGS)]


def queries():
    return [rows_of(random_matrix(QUERIES, 50 + seed)) for seed in range(TRAININGS)]


def dense(method):
    """Each training's scores by whole matrices in float64."""
    found = []
    for seed in range(TRAININGS):
        r = random_matrix(ROWS, seed).double()
        q = random_matrix(QUERIES, 50 + seed).double()
        c = r.T @ r / len(r)
        damped = c + c.trace() / len(r) * torch.eye(4)
        solved = torch.linalg.solve(damped, r.T) if method == "preconditioned" else r.T
        found.append((q @ solved).numpy())
    return np.stack(found)


@pytest.mark.parametrize("method", ["preconditioned", "dot"])
def test_the_mean_and_its_standard_error_are_those_of_whole_matrices(method):
    combined = combine_scores(stores(), queries(), method)
    expected = dense(method)
    np.testing.assert_allclose(combined.each, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(combined.scores, expected.mean(0), rtol=1e-4, atol=1e-5)
    error = expected.std(0, ddof=1) / np.sqrt(TRAININGS)
    np.testing.assert_allclose(combined.errors, error, rtol=1e-4, atol=1e-5)
    assert combined.values.tolist() == [*range(100, 100 + ROWS)]


def test_lines_are_of_the_mean_with_the_error_of_each():
    data = Dataset.from_dict({"text": [f"text {i}" for i in range(100 + ROWS)]})
    combined = combine_scores(stores(), queries())
    lines = combined.attribute(top_k=2, bottom_k=2, dataset=data).to_list()
    expected = dense("preconditioned")
    means, errors = expected.mean(0), expected.std(0, ddof=1) / np.sqrt(TRAININGS)
    for query in range(QUERIES):
        order = (-means[query]).argsort()
        mine = [line for line in lines if line["query"] == query]
        assert [line["rank"] for line in mine] == [0, 1, -2, -1]
        for line, place in zip(mine, [*order[:2], *order[-2:]], strict=True):
            assert line["example_id"] == 100 + place
            assert line["query_id"] == 100 + query
            assert line["text"] == f"text {100 + place}"
            assert line["score"] == pytest.approx(means[query, place], rel=1e-4)
            assert line["error"] == pytest.approx(errors[query, place], rel=1e-4)


def test_rows_of_an_example_and_groups_of_examples_are_summed_in_each_training():
    source = Dataset.from_dict({"source": ["web", "book"] * 60})
    joined = [store.join(source, "source") for store in stores()]
    combined = combine_scores(joined, queries(), "dot", groups="source")
    expected = dense("dot")
    sums = np.stack([expected[:, :, 1::2].sum(2), expected[:, :, ::2].sum(2)], 2)
    np.testing.assert_allclose(combined.each, sums, rtol=1e-4, atol=1e-5)
    assert combined.attribute(1)["source"][:] == [
        ["book", "web"][place] for place in sums.mean(0).argmax(1)
    ]


def test_trainings_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="Got 1 stores and 1 sets of queries"):
        combine_scores(stores()[:1], queries()[:1])
    with pytest.raises(ValueError, match="Got 3 stores and 2 sets of queries"):
        combine_scores(stores(), queries()[:2])
    other = [*stores()[:2], rows_of(random_matrix(ROWS - 1, 2))]
    with pytest.raises(ValueError, match=r"Training 2 has other example_id.*: 6 and 7"):
        combine_scores(other, queries())
    asked = [*queries()[:2], rows_of(random_matrix(1, 52))]
    with pytest.raises(ValueError, match="Training 2 has other queries"):
        combine_scores(stores(), asked)


def test_queries_at_several_states_of_a_model_are_taken():
    rows = [store.dataset.add_column("step", [0] * ROWS) for store in stores()]
    at_steps = [
        type(store)(store.model_sketch, some)
        for store, some in zip(stores(), rows, strict=True)
    ]
    by_step = [{0: some, 9: rows_of(random_matrix(QUERIES, 80))} for some in queries()]
    combined = combine_scores(at_steps, by_step, "dot")
    np.testing.assert_allclose(combined.each, dense("dot"), rtol=1e-4, atol=1e-5)
