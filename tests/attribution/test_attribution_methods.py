"""Each method against its formula in dense matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from hf_sketch import Influence, ModelSketch, Preconditioned, Spectrum, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.rows_in_memory import SKETCH, random_matrix, rows_of
from tests.helpers.trained.training import tiny_bert, tiny_trainer


def dense(matrix):
    return matrix.double().numpy()


def test_preconditioned_scores_solve_with_the_damped_covariance():
    rows, queries = random_matrix(40, 0), random_matrix(3, 1)
    rows[:, 2] *= 7
    store = rows_of(rows)
    covariance = dense(rows).T @ dense(rows) / 40
    damped = covariance + 0.2 * np.trace(covariance) / 40 * np.eye(4)
    expected = dense(queries) @ np.linalg.inv(damped) @ dense(rows).T
    got = store.scores(rows_of(queries), store.preconditioned(damping=0.2))
    assert got.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    default = store.scores(rows_of(queries), "preconditioned")
    by_hand = store.scores(rows_of(queries), store.preconditioned())
    assert torch.equal(default, by_hand)


def test_an_examples_score_is_that_of_the_sum_of_its_rows_by_default():
    rows, queries = random_matrix(12, 0), random_matrix(2, 1)
    ids = [100 + i % 5 for i in range(12)]
    store = rows_of(rows, step=[*range(12)])
    store = replace(
        store,
        dataset=store.dataset.remove_columns("example_id").add_column(
            "example_id", ids
        ),
    )
    covariance = dense(rows).T @ dense(rows) / 12
    damped = covariance + np.trace(covariance) / 5 * np.eye(4)  # of five examples
    sums = np.stack([dense(rows[i::5]).sum(0) for i in range(5)])
    expected = dense(queries) @ np.linalg.inv(damped) @ sums.T
    lines = store.attribute(rows_of(queries), 5)
    assert lines["query"][:] == [0] * 5 + [1] * 5
    for query in (0, 1):
        mine = lines.filter(lambda line, q=query: line["query"] == q)
        order = (-expected[query]).argsort()
        assert mine["example_id"][:] == (100 + order).tolist()
        assert mine["score"][:] == pytest.approx(expected[query][order], rel=1e-5)
        assert mine["rows"][:] == [[3, 3, 2, 2, 2][i] for i in order]
        assert mine["step"][:] == [[10, 11, 7, 8, 9][i] for i in order]  # its last row
    some = store.where(step=range(6))  # other rows, but the covariance of all
    kept = np.stack([dense(rows[:6][i::5]).sum(0) for i in range(5)])
    got = some.scores(rows_of(queries), groups="example_id").numpy()
    expected = dense(queries) @ np.linalg.inv(damped) @ kept.T
    assert got == pytest.approx(expected, rel=1e-5)
    eigenvalues = np.linalg.eigvalsh(covariance)
    filled = (eigenvalues / (eigenvalues + np.trace(covariance) / 5)).sum()
    found = store.preconditioned().effective_dimension
    assert found == pytest.approx(filled, rel=1e-6)
    assert store.preconditioned() is some.preconditioned()  # taken once


def test_cosines_of_an_examples_rows_are_averaged():
    rows, queries = random_matrix(6, 0), random_matrix(2, 1)
    label = [0, 1, 0, 1, 0, 0]
    store = rows_of(rows, label=label)
    unit = [dense(torch.nn.functional.normalize(x, dim=1)) for x in (queries, rows)]
    cosines = unit[0] @ unit[1].T
    expected = np.stack([cosines[:, np.array(label) == i].mean(1) for i in (0, 1)], 1)
    got = store.scores(rows_of(queries), "cosine", groups="label")
    assert got.numpy() == pytest.approx(expected, rel=1e-5)


def test_sketches_that_the_rows_fill_are_too_short(caplog):
    full = rows_of(torch.eye(4).repeat(500, 1))  # as many directions as numbers
    full.attribute(rows_of(random_matrix(1, 1)), 1)
    assert "Record with an out_size of 16" in caplog.text
    caplog.clear()
    rows_of(random_matrix(4, 0)).attribute(rows_of(random_matrix(1, 1)), 1)
    assert not caplog.records


def test_lines_carry_the_texts_and_labels_of_the_dataset():
    store = rows_of(random_matrix(3, 0))
    store = replace(
        store,
        dataset=store.dataset.remove_columns("example_id").add_column(
            "example_id", [0, 1, 2]
        ),
    )
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]})
    queries = rows_of(random_matrix(1, 1))
    lines = store.attribute(queries, 3, dataset=data, id2label={0: "no", 1: "yes"})
    said = {(line["example_id"], line["text"], line["label"]) for line in lines}
    assert said == {(0, "a", "yes"), (1, "b", "no"), (2, "c", "yes")}
    named = data.cast_column("label", ClassLabel(names=["x", "y"]))
    lines = store.attribute(queries, 1, dataset=named)
    assert lines["label"][0] == ["y", "x", "y"][lines["example_id"][0]]
    with pytest.raises(ValueError, match=r"got columns \['ids'\]: pass it as it was"):
        store.attribute(queries, 1, dataset=Dataset.from_dict({"ids": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"must be in the dataset, got \[2\] of 2"):
        store.attribute(queries, 3, dataset=data.select(range(2)))


def test_rows_that_are_not_finite_are_no_part_of_the_covariance():
    rows = random_matrix(6, 0)
    rows[2, 1] = float("inf")
    expected = dense(rows[[0, 1, 3, 4, 5]])
    got = rows_of(rows).preconditioned().covariance.numpy()
    assert got == pytest.approx(expected.T @ expected / 5, rel=1e-5)


def spectrum_of(eigenvalues, vectors, model_sketch=SKETCH):
    """A spectrum of a Hessian of trace 0, as hessian_spectrum keeps one."""
    count = len(eigenvalues)
    assert abs(float(eigenvalues.sum())) < 1e-6
    return Spectrum(
        model_sketch=model_sketch,
        step=0,
        loss=0.0,
        sketched=eigenvalues.double(),
        residuals=torch.zeros(count, dtype=torch.float64),
        weights=torch.full((count,), 1 / count, dtype=torch.float64),
        gradient=torch.ones(4),
        gradient_along=torch.ones(count, dtype=torch.float64),
        vectors=vectors[-2:],
        vector_places=torch.tensor([count - 2, count - 1]),
        loss_of_orthogonality=0.0,
        mode="autograd",
        unit="examples",
    )


def test_influence_solves_with_the_kept_part_of_the_hessian():
    rows, queries = random_matrix(10, 0), random_matrix(3, 1)
    vectors = torch.linalg.qr(random_matrix(4, 2))[0]
    values = torch.tensor([-5.0, 0.0, 1.0, 4.0])
    spectrum = spectrum_of(values, vectors)
    kept = dense(vectors[-2:])
    found = spectrum.eigenvalues[-2:].abs().numpy()
    damped = kept.T @ np.diag(found) @ kept + 0.1 * found.max() * np.eye(4)
    expected = dense(queries) @ np.linalg.inv(damped) @ dense(rows).T
    got = rows_of(rows).scores(rows_of(queries), Influence(spectrum, 0.1))
    assert got.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_bad_settings_of_methods_are_named():
    store = rows_of(random_matrix(5, 0))
    queries = rows_of(random_matrix(2, 1))
    other = ModelSketch(SKETCH.shapes, 4, seed=1)
    values = torch.tensor([-5.0, 0.0, 1.0, 4.0])
    foreign = spectrum_of(values, torch.eye(4), other)
    with pytest.raises(ValueError, match=r"got another map: take it of Sketched"):
        store.attribute(queries, method=Influence(foreign, 0.1))
    with pytest.raises(ValueError, match=r"damping must be positive, got 0: pass"):
        store.preconditioned(damping=0)
    with pytest.raises(ValueError, match=r"mean squared length .* got 0\.0: leave"):
        Preconditioned(torch.zeros(4, 4).double(), 10, 0.1)
    with pytest.raises(ValueError, match=r"with a learning_rate, got the columns \["):
        store.attribute(queries, method="tracin")
    with pytest.raises(ValueError, match=r"need rows with a step, got the columns"):
        store.attribute({1: queries})
    with pytest.raises(ValueError, match=r"no rows of steps: these rows were made out"):
        store.step_rows()


def test_groups_are_sums_over_their_rows():
    rows, queries = random_matrix(30, 0), random_matrix(3, 1)
    label = [["cat", "dog", "eel"][i % 3] for i in range(30)]
    store = rows_of(rows, label=label)
    expected = dense(queries) @ np.stack([dense(rows[i::3]).sum(0) for i in range(3)]).T
    got = store.scores(rows_of(queries), "dot", groups="label")
    assert got.numpy() == pytest.approx(expected, rel=1e-4)
    lines = store.attribute(rows_of(queries), 1, "dot", bottom_k=1, groups="label")
    names = np.array(["cat", "dog", "eel"])
    assert lines["label"][::2] == names[expected.argmax(1)].tolist()
    assert lines["label"][1::2] == names[expected.argmin(1)].tolist()
    assert lines["rows"][:] == [10] * 6


def test_columns_of_the_training_data_are_joined_by_id():
    store = rows_of(random_matrix(4, 0))  # of the examples 100 to 103
    data = Dataset.from_dict(
        {"key": [103, 100, 101, 99, 102], "text": ["d", "a", "b", "-", "c"]}
    )
    joined = store.join(data, "text", on="key")
    assert joined.dataset["text"][:] == ["a", "b", "c", "d"]
    assert joined.where(text="c").dataset["example_id"][:] == [102]
    assert joined.where(text=["a", "d"]).dataset["example_id"][:] == [100, 103]
    lines = joined.attribute(rows_of(random_matrix(1, 1)), 4)
    by_id = dict(zip(data["key"], data["text"], strict=True))
    assert lines["text"][:] == [by_id[i] for i in lines["example_id"]]
    with pytest.raises(ValueError, match=r"got \[100, 101, 102, 103\] of 5 rows: pass"):
        store.join(data, "text")


def test_self_influence_is_the_score_of_a_row_with_itself():
    rows = random_matrix(20, 0)
    store = rows_of(rows)
    for method in ("dot", "cosine", "preconditioned"):
        expected = store.scores(store, method).diagonal()
        assert torch.allclose(store.self_influence(method), expected, rtol=1e-4)


def test_a_row_meets_the_queries_of_the_nearest_state():
    rows = random_matrix(6, 0)
    store = rows_of(rows, step=[0, 4, 6, 9, 11, 40])
    states = {5: rows_of(random_matrix(2, 1)), 10: rows_of(random_matrix(2, 2))}
    got = store.scores(states, "dot")
    early, late = random_matrix(2, 1) @ rows.T, random_matrix(2, 2) @ rows.T
    assert torch.allclose(got[:, :3], early[:, :3])
    assert torch.allclose(got[:, 3:], late[:, 3:])
    other = rows_of(random_matrix(3, 1))
    with pytest.raises(
        ValueError, match=r"different queries: \{5: 2, 10: 3\} queries by step"
    ):
        store.scores({5: states[5], 10: other})


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    """Rows of a run with clipping, and queries at its end."""
    directory = tmp_path_factory.mktemp("clipped")
    trainer = tiny_trainer(
        directory,
        GradientSketchCallback(1024, layout="blocked"),
        model=tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        num_train_epochs=2,
        max_grad_norm=0.1,
    )
    trainer.train()
    return load_sketches(directory)


def test_in_run_tracin_of_a_steps_examples_is_that_of_the_step(clipped):
    queries = clipped.where(step=1)
    assert min(clipped.steps["clip_factor"]) < 0.9
    by_step = clipped.scores(queries, "tracin", groups="step")
    steps = clipped.step_rows()
    expected = steps.scores(queries, "tracin")
    assert by_step.shape == expected.shape
    assert by_step.numpy() == pytest.approx(
        expected.numpy(), rel=1e-3, abs=1e-3 * float(expected.abs().max())
    )
    lines = steps.attribute(queries, 1, "tracin")
    assert lines["step"][:] == (expected.argmax(1) + 1).tolist()


def test_tracin_sums_an_examples_occasions(clipped):
    queries = clipped.where(step=[1, 2])
    rows = clipped.dataset.with_format("numpy")
    clip = dict(zip(clipped.steps["step"], clipped.steps["clip_factor"], strict=True))
    gains = rows["learning_rate"][:] * rows["weight"][:]
    gains = gains * np.array([clip[step] for step in rows["step"][:]])
    each = dense(clipped.scores(queries, "dot")) * gains
    ids = rows["example_id"][:]
    expected = np.stack([each[:, ids == i].sum(1) for i in range(ids.max() + 1)], 1)
    got = clipped.scores(queries, "tracin", groups="example_id")
    scale = np.abs(expected).max()
    assert got.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6 * scale)


def test_recorded_rows_meet_the_state_that_their_step_began_with(clipped):
    queries = clipped.where(step=1)
    zero = rows_of(torch.zeros(len(queries.dataset), 1024), clipped.model_sketch)
    zero = zero.where(example_id=zero.dataset["example_id"][:])
    ids = queries.dataset["example_id"][:]
    zero = rows_of(torch.zeros(len(ids), 1024), clipped.model_sketch)
    zero_data = zero.dataset.remove_columns("example_id").add_column("example_id", ids)
    zero = type(zero)(clipped.model_sketch, zero_data)
    last = max(clipped.dataset["step"])
    got = clipped.scores({last - 1: queries, last - 2: zero}, "dot")
    rows = np.asarray(clipped.dataset["step"][:])
    assert float(got[:, rows < last].abs().max()) == 0
    assert float(got[:, rows == last].abs().min()) > 0
