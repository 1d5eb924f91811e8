import sys

import pytest
import torch

from hf_sketch import Cosine
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.rows_in_memory import random_matrix, rows_of


def clusters(rows, seed):
    """Rows about 20 centres."""
    centres = 5 * random_matrix(20, 7)
    return centres[torch.arange(rows) % 20] + random_matrix(rows, seed)


@pytest.mark.parametrize("method", ["dot", "cosine", "preconditioned"])
def test_a_search_of_all_lists_is_exact(method):
    store, queries = rows_of(clusters(500, 0)), rows_of(random_matrix(6, 1))
    index = store.build_index(method, lists=10, probed=10)
    scores, rows = index.search(sketch_matrix(queries.dataset), 7)
    expected = store.scores(queries, method).topk(7)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=1e-4, atol=1e-5)
    assert index.recall(sketch_matrix(queries.dataset), 7) == 1


def test_recall_is_the_part_of_the_exact_answers_that_is_found():
    store, queries = rows_of(clusters(500, 0)), clusters(30, 1)
    recalls = []
    for probed in (1, 4, 20):
        index = store.build_index(Cosine(), lists=20, probed=probed)
        exact = store.scores(rows_of(queries), "cosine").topk(10).indices
        found = index.search(queries, 10)[1]
        hits = [len({*e.tolist()} & {*f.tolist()}) for e, f in zip(exact, found)]  # noqa: B905
        recalls.append(index.recall(queries, 10))
        assert recalls[-1] == pytest.approx(sum(hits) / 300)
    assert 0.2 < recalls[0] < recalls[1] <= recalls[2] == 1


def test_rows_that_are_not_finite_are_not_found():
    rows = clusters(50, 0)
    rows[7] = float("nan")
    index = rows_of(rows).build_index(lists=2, probed=2)
    found = index.search(random_matrix(1, 1), 50)[1]
    assert sorted(found[0].tolist()) == [-1, *(i for i in range(50) if i != 7)]


def test_bad_settings_are_named(monkeypatch):
    store = rows_of(clusters(50, 0))
    with pytest.raises(ValueError, match=r"got 9, 4 and 50 rows: pass smaller ones"):
        store.build_index(lists=4, probed=9)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r'Call pip install "hf-sketch\[faiss',
    ):
        store.build_index()
