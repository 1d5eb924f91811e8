import copy

import pytest
import torch

from hf_sketch import (
    ModelSketch,
    concatenate_sketches,
    load_sketches,
    sketch_dataset,
)
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.rows_in_memory import SKETCH, random_matrix, rows_of
from tests.helpers.trained.training import tiny_bert, tiny_dataset, tiny_trainer


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_scores_are_those_of_the_full_matrix(monkeypatch, method):
    monkeypatch.setattr("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * 7)
    monkeypatch.setattr("hf_sketch.attribution.scores._QUERIES_AT_ONCE", 2)
    rows, queries = random_matrix(50, 0), random_matrix(5, 1)
    store, asked = rows_of(rows), rows_of(queries)
    lines = store.attribute(asked, 6, method, bottom_k=3)
    scores = queries @ rows.T
    if method == "cosine":
        scores /= queries.norm(dim=1)[:, None] * rows.norm(dim=1)[None]
    order = scores.argsort(1, descending=True)
    order = torch.cat([order[:, :6], order[:, -3:]], 1)
    assert lines["query"][:] == [q for q in range(5) for _ in range(9)]
    assert lines["query_id"][:] == [100 + q for q in range(5) for _ in range(9)]
    assert lines["rank"][:] == [0, 1, 2, 3, 4, 5, -3, -2, -1] * 5
    assert lines["example_id"][:] == (order.flatten() + 100).tolist()
    expected = scores.gather(1, order).flatten().tolist()
    assert lines["score"][:] == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(store.scores(asked, method), scores, rtol=1e-5, atol=1e-6)


def test_a_top_k_beyond_the_rows_gives_them_all():
    top = rows_of(random_matrix(3, 0)).attribute(rows_of(random_matrix(2, 1)), 10)
    assert len(top) == 6


def test_columns_of_the_rows_come_along():
    store = rows_of(random_matrix(3, 0), step=[5, 6, 7], epoch=[0, 0, 1])
    top = store.attribute(rows_of(random_matrix(1, 1)), 3)
    assert [step - 5 for step in top["step"]] == [i - 100 for i in top["example_id"]]


@pytest.mark.parametrize("descending", [False, True])
def test_memory_does_not_grow_with_the_store(monkeypatch, descending):
    """Blocks are looked through one by one, those without better rows not at all."""
    rows, query = random_matrix(200, 0), random_matrix(1, 1)
    rows = rows[(rows @ query[0]).argsort(descending=descending)]
    sizes = []
    plain = torch.Tensor.topk

    def noting(self, *args, **kwargs):
        sizes.append(self.shape[1])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * 10)
    monkeypatch.setattr(torch.Tensor, "topk", noting)
    top = rows_of(rows).attribute(rows_of(query), 3, "dot")
    assert sizes == ([10] if descending else [10] + [3 + 10] * 19)
    best = [0, 1, 2] if descending else [199, 198, 197]
    assert top["example_id"][:] == [100 + place for place in best]


def test_of_equal_rows_in_several_blocks_the_first_are_returned(monkeypatch):
    monkeypatch.setattr("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * 10)
    # Whole numbers have exact products; of others the place may decide the rounding.
    one, asked = (4 * random_matrix(n, seed) for n, seed in ((1, 0), (2, 1)))
    rows, queries = one.round().repeat(45, 1), asked.round()
    top = rows_of(rows).attribute(rows_of(queries), 3, "dot", bottom_k=2)
    assert top["example_id"][:] == [100, 101, 102, 101, 100] * 2


def test_rows_that_are_not_finite_are_passed_over():
    rows = random_matrix(5, 0)
    rows[2, 1] = float("nan")
    store = rows_of(rows)
    with pytest.warns(UserWarning, match="Skipped 1 rows with a NaN .* finite=False"):
        top = store.attribute(rows_of(random_matrix(1, 1)), 10)
    assert sorted(top["example_id"]) == [100, 101, 103, 104]


def test_examples_without_a_finite_row_have_no_mean_score():
    rows, queries = random_matrix(5, 0), rows_of(random_matrix(2, 1))
    expected = rows_of(rows).where(example_id=[100, 101, 103, 104])
    expected = expected.attribute(queries, 2, "cosine", bottom_k=2)
    rows[2, 1] = float("nan")
    twice = concatenate_sketches([rows_of(rows)] * 2)
    with pytest.warns(UserWarning, match="Skipped 2 rows with a NaN"):
        top = twice.attribute(queries, 2, "cosine", bottom_k=2)
    assert top["example_id"][:] == expected["example_id"][:]
    assert top["score"][:] == pytest.approx(expected["score"][:], rel=1e-5)


def test_where_picks_rows_by_columns():
    store = rows_of(random_matrix(4, 0), epoch=[0, 0, 1, 1], step=[1, 2, 1, 2])
    assert store.where(epoch=1).dataset["example_id"][:] == [102, 103]
    assert store.where(epoch=1, step=2).dataset["example_id"][:] == [103]
    assert store.where(step=[2, 3], epoch=0).dataset["example_id"][:] == [101]
    assert store.where(step=range(5)).dataset["example_id"][:] == [100, 101, 102, 103]
    with pytest.raises(ValueError, match=r"one of \[.*'epoch'.*\], got 'epochs'"):
        store.where(epochs=1)
    with pytest.raises(ValueError, match=r"must have \{'epoch': 7\}, got none: see"):
        store.where(epoch=7)


def test_bad_queries_are_named():
    store = rows_of(random_matrix(4, 0))
    other = ModelSketch(SKETCH.shapes, 4, seed=1)
    with pytest.raises(
        ValueError, match=r"another map .* Make them with sketch_dataset\("
    ):
        store.attribute(rows_of(random_matrix(1, 0), other))
    broken = rows_of(torch.full((2, 4), float("inf")))
    with pytest.raises(ValueError, match=r"in rows \[0, 1\] are .* Leave them out"):
        store.attribute(broken)
    queries = rows_of(random_matrix(1, 0))
    with pytest.raises(ValueError, match="or bottom_k, got 0 and 0: pass 1 or more"):
        store.attribute(queries, top_k=0)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'euclid'"):
        store.attribute(queries, method="euclid")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    callback = GradientSketchCallback(1024, layout="blocked")
    trainer = tiny_trainer(directory, callback, model=model, num_train_epochs=6)
    trainer.train()
    return trainer.model.double(), load_sketches(directory)


def loss_of(model, example):
    inputs = {
        name: torch.tensor([example[name]]) for name in ("input_ids", "attention_mask")
    }
    return model(**inputs, labels=torch.tensor([example["label"]])).loss


def test_one_sgd_step_on_a_proponent_lowers_the_querys_loss(trained):
    model, store = trained
    data = tiny_dataset()
    query = data.select([2])
    at_end = sketch_dataset(model, data, store.model_sketch)
    queries = sketch_dataset(model, query, store.model_sketch)
    for proponent, line in zip(
        (True, False),
        at_end.attribute(queries, top_k=1, method="dot", bottom_k=1),
        strict=True,
    ):
        stepped = copy.deepcopy(model).eval()
        before = loss_of(stepped, query[0]).detach()
        loss_of(stepped, data[line["example_id"]]).backward()
        rate = 1e-4
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter -= rate * parameter.grad
        lowered = float(before - loss_of(stepped, query[0]).detach())
        assert (lowered > 0) == (line["score"] > 0) == proponent
        # To first order the loss falls by rate * score; the sketch adds its error.
        assert abs(lowered / rate - line["score"]) < 0.25 * abs(line["score"])


def test_an_example_is_its_own_strongest_proponent_by_cosine(trained):
    model, store = trained
    data = tiny_dataset()
    rows = sketch_dataset(model, data, store.model_sketch)
    top = rows.attribute(rows, top_k=1, method="cosine")
    assert top["example_id"][:] == list(range(len(data)))
    assert top["score"][:] == pytest.approx([1.0] * len(data), rel=1e-5)


def test_recorded_rows_answer_queries(trained):
    model, store = trained
    queries = sketch_dataset(model, tiny_dataset().select(range(3)), store.model_sketch)
    top = store.where(epoch=5).attribute(queries, top_k=4)
    assert len(top) == 12
    assert set(top["epoch"]) == {5}
