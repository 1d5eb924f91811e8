"""Wrong labels and duplicates found among a store's own examples, on dense matrices."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_sketch import GradientRows, ModelSketch, sketch_dataset
from hf_sketch.attribution.questions import directions
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model
from tests.helpers.rows_in_memory import SKETCH, random_matrix, rows_of

GROUPED = ModelSketch((("a", (8, 4)), ("b", (8, 4))), 2, groups=("a", "b"))
EPOCHS, EXAMPLES = 3, 10


@pytest.fixture(params=["one block", "blocks"])
def blocks(request, monkeypatch):
    """All examples at once, or three."""
    if request.param == "blocks":
        monkeypatch.setattr(directions, "_NUMBERS_AT_ONCE", 12)


def recorded(matrix, model_sketch=SKETCH, **columns):
    """Rows of several epochs, each with its examples in another order."""
    count = len(matrix) // EPOCHS
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(count) for _ in range(EPOCHS)])
    rows = rows_of(
        matrix, model_sketch, epoch=np.arange(EPOCHS).repeat(count), **columns
    )
    names = ["example_id", *(["loss"] if "losses" in columns else [])]
    dataset = rows.dataset.remove_columns(names).add_column("example_id", ids)
    if "losses" in columns:
        dataset = dataset.rename_column("losses", "loss")
    return GradientRows(model_sketch, dataset), ids


def dense(matrix, ids, model_sketch, damping):
    """Unit rows, directions by example, and the metric."""
    rows = matrix.double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([unit[ids == i].mean(0) for i in range(max(ids) + 1)])
    metric = np.zeros((4, 4))
    for at in model_sketch.layer_groups.columns.values():
        c = sum(np.outer(u[at], u[at]) for u in unit) / len(unit)
        added = damping * np.trace(c) / len(means) * np.eye(len(c))
        metric[at, at] = np.linalg.inv(c + added)
    return unit, means, metric


def by_id(lines):
    """Columns of the lines, in the order of the examples."""
    columns = lines.with_format("numpy")[:]
    order = columns["example_id"].argsort()
    return {name: values[order] for name, values in columns.items()}


def pairs_of(lines):
    return list(zip(lines["example_id"][:], lines["other_id"][:], strict=True))


def z(values):
    return (values - values.mean()) / values.std()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("model_sketch", [SKETCH, GROUPED], ids=["whole", "grouped"])
def test_suspicion_is_the_mean_of_loss_and_disagreement(model_sketch):
    matrix = random_matrix(EPOCHS * EXAMPLES, 0)
    losses = torch.rand(len(matrix), generator=torch.Generator().manual_seed(1)).numpy()
    store, ids = recorded(matrix, model_sketch, losses=losses)
    lines = by_id(store.find_mislabeled())
    _, means, metric = dense(matrix, ids, model_sketch, 1.0)
    apart = [
        -sum(means[i] @ metric @ means[j] for j in range(EXAMPLES) if j != i) / EXAMPLES
        for i in range(EXAMPLES)
    ]
    by_epoch = np.array([losses[ids == i] for i in range(EXAMPLES)])
    np.testing.assert_allclose(lines["disagreement"], z(np.array(apart)), atol=1e-5)
    np.testing.assert_allclose(lines["excess_loss"], z(by_epoch.mean(1)), atol=1e-5)
    both = (z(np.array(apart)) + z(by_epoch.mean(1))) / 2
    np.testing.assert_allclose(lines["suspicion"], both, atol=1e-5)
    np.testing.assert_allclose(lines["losses"], by_epoch, rtol=1e-6)
    norms = matrix.norm(dim=1).numpy()
    norms = [norms[ids == i].mean() for i in range(EXAMPLES)]
    np.testing.assert_allclose(lines["gradient_norm"], norms, rtol=1e-6)
    order = store.find_mislabeled()["example_id"][:]
    assert order == (-both).argsort().tolist()


def test_rows_that_pull_the_other_way_are_the_most_suspicious():
    matrix = random_matrix(60, 2)
    wrong = [3, 20, 41]
    matrix[:, 0] = 4
    matrix[wrong, 0] = -4
    rows = rows_of(matrix)
    texts = Dataset.from_dict({"text": [f"text {i}" for i in range(160)]})
    lines = rows.find_mislabeled(texts)
    assert {i - 100 for i in lines["example_id"][:3]} == set(wrong)
    assert lines["text"][0] == f"text {lines['example_id'][0]}"


def test_an_example_that_missed_the_hard_first_epoch_is_no_less_suspicious():
    losses = np.array([[5.0, 1.0], [5.2, 1.2], [4.8, 0.8], [np.nan, 1.1]], np.float32)
    matrix = random_matrix(8, 3)
    rows = rows_of(matrix, epoch=[0] * 4 + [1] * 4)
    columns = {"example_id": [0, 1, 2, 3] * 2, "loss": losses.T.flatten()}
    dataset = rows.dataset.remove_columns([*columns])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    dataset = dataset.select([0, 1, 2, 4, 5, 6, 7])
    lines = by_id(GradientRows(SKETCH, dataset).find_mislabeled())
    above = lines["excess_loss"]
    assert above[1] > above[3] > above[0] > above[2]
    assert np.isnan(lines["losses"][3][0])
    assert lines["losses"][3][1] == pytest.approx(1.1)


def test_rows_without_loss_or_finite_numbers_are_ranked_by_what_there_is():
    matrix = random_matrix(12, 4)
    matrix[5] = torch.nan
    rows = rows_of(matrix)
    dataset = rows.dataset.remove_columns("loss")
    rows = GradientRows(SKETCH, dataset.add_column("loss", [np.nan] * 12))
    lines = rows.find_mislabeled()
    assert lines["suspicion"][:] == lines["disagreement"][:]
    assert np.isfinite(lines["suspicion"][:]).all()
    found = set(rows.find_duplicates(threshold=1e-6)["example_id"][:])
    assert found
    assert 105 not in found


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("model_sketch", [SKETCH, GROUPED], ids=["whole", "grouped"])
def test_duplicates_are_all_pairs_of_a_great_cosine(model_sketch):
    matrix = random_matrix(EPOCHS * EXAMPLES, 5)
    store, ids = recorded(matrix, model_sketch)
    _, means, metric = dense(matrix, ids, model_sketch, 0.1)
    products = means @ metric @ means.T
    norms = np.sqrt(products.diagonal())
    cosines = products / np.outer(norms, norms)
    pairs = [(i, j) for j in range(EXAMPLES) for i in range(j) if cosines[i, j] >= 0.2]
    pairs.sort(key=lambda pair: -cosines[pair])
    assert len(pairs) > 5
    lines = store.find_duplicates(threshold=0.2)
    assert pairs_of(lines) == pairs
    expected = [cosines[pair] for pair in pairs]
    np.testing.assert_allclose(lines["cosine"][:], expected, rtol=1e-4)
    best = store.find_duplicates(threshold=0.2, max_pairs=4)
    assert best[:] == lines[:4]


def test_the_threshold_is_what_the_rows_of_an_example_have_in_common():
    shared = random_matrix(EXAMPLES, 6)
    matrix = shared.repeat(EPOCHS, 1)
    store, ids = recorded(matrix)
    matrix = shared[ids] + 0.7 * random_matrix(EPOCHS * EXAMPLES, 7)
    table = store.dataset.remove_columns("sketch").add_column("sketch", matrix.tolist())
    store = GradientRows(SKETCH, table.cast(store.dataset.features))
    unit, means, metric = dense(matrix, ids, SKETCH, 0.1)
    among = [
        u @ metric @ v
        for i in range(EXAMPLES)
        for a, u in enumerate(unit[ids == i])
        for b, v in enumerate(unit[ids == i])
        if a != b
    ]
    own = sum(among) / (EPOCHS * (EPOCHS - 1))
    threshold = 0.75 * own / sum(m @ metric @ m for m in means)
    assert 0.2 < threshold < 0.65
    lines = store.find_duplicates()
    assert len(lines) > len(store.find_duplicates(threshold=0.75))
    assert lines[:] == store.find_duplicates(threshold=threshold)[:]


def test_without_repeated_rows_the_threshold_is_of_the_measured_error():
    rows = rows_of(random_matrix(30, 8))
    lines = rows.find_duplicates(threshold=0.3)
    pair, cosine = pairs_of(lines)[-1], lines["cosine"][-1]
    error = 1 - cosine / 0.75
    assert 0.2 < error < 0.7
    for wrong, there in ((error + 0.01, True), (error - 0.01, False)):
        measured = MeasuredError(3, 0.9, wrong, 0.0)
        store = GradientRows(SKETCH, rows.dataset, measured_error=measured)
        assert (pair in pairs_of(store.find_duplicates())) == there


def test_planted_copies_and_paraphrases_are_found():
    texts = [
        ("A man plays the guitar on a stage.", "A musician performs.", 0),
        ("Two dogs chase a ball in the park.", "The animals are asleep.", 2),
        ("A woman reads a book in a cafe.", "She waits for a friend.", 1),
        ("Children swim in the lake.", "Some kids are in the water.", 0),
        ("A cyclist rides down a steep hill.", "The cyclist won a race.", 1),
        ("A chef cuts onions in a kitchen.", "Nobody is cooking.", 2),
        ("Workers repair the roof of a house.", "People work outdoors.", 0),
        ("A girl blows out the candles on a cake.", "It is her tenth birthday.", 1),
        ("An old man feeds pigeons in a square.", "The square is empty.", 2),
    ]
    copies = [texts[1], texts[5]]
    paraphrases = [
        ("A man plays a guitar on the stage.", "One musician performs.", 0),
        ("A lady reads some book in a cafe.", "She waits for her friend.", 1),
    ]
    rows = [*texts, *copies, *paraphrases]
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    torch.manual_seed(0)
    model = new_model()
    data = [{**tokenizer(a, b), "labels": label} for a, b, label in rows]
    sketch = ModelSketch.from_model(model, 1024, layout="grouped")
    store = sketch_dataset(model, data, sketch, processing_class=tokenizer)
    pairs = pairs_of(store.find_duplicates())
    assert set(pairs[:2]) == {(1, 9), (5, 10)}
    assert set(pairs) == {(1, 9), (5, 10), (0, 11), (2, 12)}


def test_what_cannot_be_compared_is_named():
    rows = rows_of(random_matrix(6, 10))
    steps = GradientRows(SKETCH, rows.dataset.remove_columns("example_id"))
    with pytest.raises(ValueError, match=r"rows of examples can be .* store itself"):
        steps.find_mislabeled()
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1.5: pass e.g. 0.9"):
        rows.find_duplicates(threshold=1.5)
    short = Dataset.from_dict({"text": ["one"]})
    with pytest.raises(ValueError, match=r"example_id must be in the dataset, got \["):
        rows.find_mislabeled(short)
