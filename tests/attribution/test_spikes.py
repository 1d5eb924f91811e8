"""Steps that stand out and the examples that made them, beside dense gradients."""

import statistics
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.questions.spikes import deviations_before
from hf_sketch.attribution.questions.step_gradient import (
    noise_and_signal,
    step_shares,
)
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.blocks import sketch_matrix
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import SKETCH, example_rows, step_row
from tests.helpers.trained.training import tiny_bert, tiny_dataset, tiny_trainer

SIZE = 4096
EXAMPLES = 22


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A Trainer whose weights stay as they are, accumulating, clipping; its store."""
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("still"),
        GradientSketchCallback(SIZE),
        model=tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        dataset=tiny_dataset(EXAMPLES),
        learning_rate=0.0,
        num_train_epochs=5,
        save_strategy="no",
        max_grad_norm=0.3,
    )
    trainer.train()
    return trainer, load_sketches(trainer.args.output_dir)


@pytest.fixture(scope="module")
def dense(still):
    """Each example's gradient by a backward pass of its own, (examples, parameters)."""
    trainer, _ = still
    model = trainer.model.eval()
    rows = []
    for example in trainer.train_dataset.remove_columns("text"):
        batch = {n: torch.tensor([x]) for n, x in example.items() if n != "label"}
        model.zero_grad()
        model(**batch, labels=torch.tensor([example["label"]])).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows).double()


def steps_of(store):
    """Each recorded step: its examples' ids, weights and rows, and its own row."""
    ids, entered = column(store.dataset, "example_id"), column(store.dataset, "step")
    rows = sketch_matrix(store.dataset)
    weights = torch.from_numpy(column(store.dataset, "weight"))
    for step in store.steps.with_format("torch"):
        own = torch.from_numpy(entered == int(step["step"]))
        yield torch.from_numpy(ids)[own], weights[own], rows[own], step


def test_shares_are_those_of_dense_gradients_under_accumulation_and_clipping(
    still, dense
):
    _, store = still
    factors = []
    for ids, weights, rows, step in steps_of(store):
        gradient = step["sketch"] / step["clip_factor"]
        factors.append(float(step["clip_factor"]))
        shares = step_shares(rows, weights, gradient).double()
        assert float(shares.sum()) == pytest.approx(1, abs=1e-4)
        own, weights = dense[ids], weights.double()
        whole = weights @ own
        exact = weights * (own @ whole) / whole.square().sum()
        assert float(exact.sum()) == pytest.approx(1, abs=1e-9)
        # An inner product's variance is at most 2 |x|^2 |y|^2 / out_size, here of both
        # products; five standard deviations.
        sizes = weights * own.norm(dim=1) / whole.norm() + exact.abs()
        assert ((shares - exact).abs() <= 5 * (2 / SIZE) ** 0.5 * sizes).all()
    assert max(factors) < 1


def test_spikes_name_the_fewest_examples_that_carry_the_gradient(still):
    trainer, store = still
    history = trainer.state.log_history
    logged = {logs["step"]: logs["loss"] for logs in history if "loss" in logs}
    lines = store.find_spikes(threshold=0.0, window=10, carried=0.6)
    assert len(lines.unique("step")) >= 2
    by_step = {int(step["step"]): rest for *rest, step in steps_of(store)}
    for number in lines.unique("step"):
        ids, weights, rows = by_step[number]
        gradient = weights.float() @ rows
        shares = step_shares(rows, weights, gradient)
        mine = lines.filter(lambda line, n=number: line["step"] == n)
        order = shares.argsort(descending=True)[: len(mine)]
        assert mine["example_id"][:] == ids[order].tolist()
        assert mine["share"][:] == pytest.approx(shares[order].tolist(), abs=1e-4)
        assert sum(mine["share"]) >= 0.6 > sum(mine["share"][:-1])
        assert mine["step_loss"][0] == pytest.approx(logged[number], rel=1e-5)
        assert mine["step_examples"][0] == len(ids)
    assert set(lines["rows"]) == {5}


def test_the_rule_is_a_running_median_with_its_median_absolute_deviation():
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).numpy()
    values[[20, 40]] = torch.nan, 9.0
    found = deviations_before(values, 15)
    for place, value in enumerate(values):
        before = [x for x in values[max(0, place - 15) : place] if x == x]
        if len(before) < 10 or value != value:
            assert found[place] != found[place]
            continue
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
        assert found[place] == pytest.approx((value - median) / deviation)
    assert found[40] > 6 > abs(found[41])


def test_a_run_that_hardly_varies_has_no_spikes_of_rounding():
    values = torch.ones(20).double().numpy()
    values[15], values[18] = 1.01, 2.0
    found = deviations_before(values, 10)
    assert found[15] == pytest.approx(0.2)
    assert found[18] == pytest.approx(20)


def written(directory, spikes, steps=20, broken=(), losses=None, short=()):
    """A store whose steps have the gradient (1, 0, 0, 0), or three times that.

    A step has four examples, a short one has one.

    Of step s the examples are 0, 1, 2, ...; at a spike the example of that number has
    the whole gradient, else each an equal part.
    """
    writer = SketchWriter(directory / "sketches", Header(SKETCH))
    unit = torch.eye(4)[:1]
    for step in range(1, steps + 1):
        examples = 1 if step in short else 4
        columns = example_rows(step, [*range(examples)])
        size = 3.0 if step in spikes else 1.0
        columns["loss"] = torch.full((examples,), (losses or {}).get(step, 0.1))
        rows = size * unit.repeat(examples, 1)
        columns["weight"] = torch.full((examples,), 1 / examples, dtype=torch.float64)
        if step in spikes:
            rows = torch.zeros(examples, 4)
            rows[spikes[step], 0] = size * examples
            columns["loss"] = columns["loss"] * 10
        if step in broken:
            rows[1, 2] = torch.inf
        columns |= {"sketch": rows, "finite": rows.isfinite().all(1)}
        writer.append(PER_EXAMPLE, columns)
        gradient = size * unit * (torch.nan if step in broken else 1)
        row = step_row(step, size, gradient)
        row |= {"clip_factor": torch.tensor([0.5]), "sketch": gradient / 2}
        row["finite"] = gradient.isfinite().all(1)
        writer.append(PER_STEP, row)
    writer.flush()
    writer.close()
    return load_sketches(directory)


def test_examples_that_recur_are_counted(tmp_path):
    store = written(tmp_path, {15: 2, 18: 2, 19: 0})
    lines = store.find_spikes(dataset=Dataset.from_dict({"text": [*"abcd"]}))
    assert lines["step"][:] == [15, 18, 19]
    assert lines["example_id"][:] == [2, 2, 0]
    assert lines["text"][:] == ["c", "c", "a"]
    assert lines["share"][:] == pytest.approx([1, 1, 1])
    assert lines["spikes"][:] == [2, 2, 1]
    assert lines["rows"][:] == [20, 20, 20]
    assert lines["step_loss"][:] == pytest.approx([1, 1, 1])
    assert lines["step_norm"][:] == [3, 3, 3]
    assert lines["clip_factor"][:] == [0.5, 0.5, 0.5]
    # All steps before are equal: a deviation is 5% of their median.
    assert lines["norm_deviation"][0] == pytest.approx(2 / 0.05)
    assert lines["loss_deviation"][0] == pytest.approx(9 / 0.05)


def test_a_loss_stands_out_where_the_gradient_does_not(tmp_path):
    lines = written(tmp_path, {}, losses={12: 0.5}).find_spikes(carried=1.0)
    assert lines["step"][:] == [12] * 4
    assert lines["loss_deviation"][0] == pytest.approx(0.4 / 0.005)
    assert lines["norm_deviation"][0] == 0


def test_a_gradient_that_is_not_finite_stands_out_and_names_its_examples(tmp_path):
    lines = written(tmp_path, {}, broken=(4,)).find_spikes()
    assert lines["step"][:] == [4]
    assert lines["example_id"][:] == [1]
    assert lines["share"][0] != lines["share"][0]
    assert lines["norm_deviation"][:] == [float("inf")]


def test_a_step_of_few_examples_does_not_stand_out_by_its_noise(tmp_path):
    store = written(tmp_path / "a", {15: 0, 18: 0}, short=(15,))
    assert set(store.find_spikes()["step"]) == {18}
    broken = written(tmp_path / "b", {}, broken=(15,))
    rows = [r for r in range(80) if broken.dataset[r]["step"] != 15 or r % 4 == 1]
    alone = replace(broken, dataset=broken.dataset.select(rows))
    assert set(alone.find_spikes()["step"]) == {15}


def test_a_run_without_spikes_has_no_lines(tmp_path):
    lines = written(tmp_path, {}).find_spikes()
    assert len(lines) == 0
    assert {"step", "share", "example_id", "spikes"} <= set(lines.column_names)


def test_what_cannot_be_asked_is_said(tmp_path):
    store = written(tmp_path, {})
    with pytest.raises(ValueError, match=r"recorded together.*per_step=True"):
        store.step_rows().find_spikes()
    with pytest.raises(ValueError, match=r"carried must be in .*got 1.5"):
        store.find_spikes(carried=1.5)
    with pytest.raises(ValueError, match=r"threshold must be .*got -1"):
        store.find_spikes(threshold=-1)
    with pytest.raises(ValueError, match=r"window must be .* at least 10, got 3"):
        store.find_spikes(window=3)


def test_noise_and_signal_are_unbiased():
    """The mean over many steps of B examples drawn from a known distribution."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 1.0, 2.0])
    steps, batch = 20_000, 4
    drawn = torch.randn(steps, batch, 3, generator=generator).double()
    rows = mean + spread * drawn
    even = torch.full((batch,), 1 / batch).double()
    found = [noise_and_signal(r, even, even @ r, batch) for r in rows]
    part = [noise_and_signal(r[:2], even[:2], even @ r, batch) for r in rows]
    for pairs in (found, part):  # a process sees a part of the step's examples
        noise, signal = torch.tensor(pairs).T
        for values, exact in ((noise, spread.square().sum()), (signal, 5.25)):
            error = values.std() / steps**0.5
            assert abs(values.mean() - exact) < 5 * error < 0.1 * exact
