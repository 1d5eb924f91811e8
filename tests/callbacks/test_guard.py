"""Steps that stand out: found before the optimizer makes them, and what is done."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback, GuardCallback
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.trained.guarded_training import (
    BAD,
    BAD_STEP,
    BATCH,
    STEPS,
    WINDOW,
    alarms_of,
    guard_of,
    guarded_trainer,
    lines_of,
    losses_of,
    recorder,
    run,
    separable,
    weights_of,
)


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Around(TrainerCallback):
    """Keeps weights and what the optimizer keeps, before and after each step."""

    def __init__(self):
        self.before, self.after, self.rates = {}, {}, {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.before[state.global_step + 1] = self._taken(model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.after[state.global_step] = self._taken(model, optimizer)
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]

    def _taken(self, model, optimizer):
        kept = [
            value.clone()
            for parameter in model.parameters()
            for value in optimizer.state[parameter].values()
        ]
        return [p.detach().clone() for p in model.parameters()] + kept


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bad batch, without any callback."""
    return run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def warned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("warned")
    trainer = guarded_trainer(directory, recorder(), guard_of())
    with pytest.warns(UserWarning, match=f"Step {BAD_STEP} stands out: .*loss") as seen:
        trainer.train()
    return trainer, directory, [str(warning.message) for warning in seen]


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    directory, around = tmp_path_factory.mktemp("skipped"), Around()
    return run(directory, recorder(), guard_of("skip"), around), directory, around


def test_training_is_the_same_bit_for_bit_while_nothing_stands_out(tmp_path):
    plain = run(tmp_path / "plain", bad=())
    recorded = run(tmp_path / "recorded", recorder(), bad=())
    guard = guard_of("quarantine", threshold=1e6)
    guarded = run(tmp_path / "guarded", recorder(), guard, bad=())
    assert_same(weights_of(plain), weights_of(guarded))
    assert losses_of(plain) == losses_of(guarded)
    assert_same(weights_of(plain), weights_of(recorded))
    rows = [
        sketch_matrix(load_sketches(tmp_path / name).dataset)
        for name in ("recorded", "guarded")
    ]
    assert torch.equal(*rows)
    assert not alarms_of(tmp_path / "guarded")


def test_a_warning_changes_nothing_in_training(plain, warned):
    trainer, directory, messages = warned
    assert_same(weights_of(plain), weights_of(trainer))
    assert losses_of(plain) == losses_of(trainer)
    assert [line["step"] for line in alarms_of(directory)] == [BAD_STEP]
    (message,) = [text for text in messages if "stands out" in text]
    assert str(BAD[0]) in message


def test_the_wrong_labels_are_named_with_their_losses_and_queries(warned):
    _, directory, _ = warned
    (line,) = alarms_of(directory)
    assert line["action"] == "warn"
    by_loss = [one for one in line["examples"] if "loss" in one["reasons"]]
    assert {one["example_id"] for one in by_loss} == {*BAD}
    rows = load_sketches(directory).where(step=BAD_STEP).dataset
    losses = dict(zip(rows["example_id"], rows["loss"], strict=True))
    for one in line["examples"]:
        assert one["loss"] == pytest.approx(losses[one["example_id"]])
        assert 0 <= one["query"] < 12
        assert -1 <= one["opposition"] <= 1


def test_measures_are_those_of_the_rows_and_of_the_guard_set(tmp_path):
    """At weights that stay, rows of the store and of `sketch_dataset` are enough."""
    guard = guard_of("log", every=7)
    trainer = run(tmp_path, recorder(), guard, learning_rate=0.0, weight_decay=0.0)
    store = load_sketches(tmp_path)
    queries = sketch_dataset(
        trainer.model, separable(12, 2).with_format("torch"), store.model_sketch
    )
    rows = store.dataset.with_format("torch")[:]
    cosines = store.scores(queries, method="cosine")
    weighted = rows["weight"] * -cosines.min(0).values
    for line in lines_of(tmp_path):
        own = rows["step"] == line["step"]
        total = rows["weight"][own].sum()
        assert line["opposition"] == pytest.approx(
            float(weighted[own].sum() / total), abs=1e-5
        )
        loss = (rows["weight"] * rows["loss"])[own].sum() / total
        assert line["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_guard_set_is_sketched_again_at_the_steps_that_are_asked_for(tmp_path):
    """With queries of the first step only, cosines of later steps are others."""
    values = {}
    for every in (1, 10, 100):
        run(tmp_path / str(every), recorder(), guard_of("log", every=every))
        lines = lines_of(tmp_path / str(every))
        values[every] = np.array([line["opposition"] for line in lines])
    same = values[1] == values[10]
    assert same[[0, 10, 20]].all()
    assert not same[[1, 9, 11, 19]].any()
    assert (values[10] == values[100])[:10].all()
    assert values[10][10] != values[100][10]


def test_deviations_are_those_of_find_spikes(warned):
    """Written out: medians of the ten steps before, and none before there are ten."""
    lines = lines_of(warned[1])
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for name in ("opposition", "loss"):
        values = np.array([line[name] for line in lines])
        for place, line in enumerate(lines):
            found = line[f"{name}_deviation"]
            if place < WINDOW:
                assert found is None
                continue
            before = values[place - WINDOW : place]
            median = np.median(before)
            spread = 1.4826 * np.median(np.abs(before - median))
            spread = max(spread, 0.05 * abs(median))
            assert found == pytest.approx((values[place] - median) / spread)
            assert (name in line["reasons"]) == (found > 5)


def test_a_skipped_step_leaves_weights_and_optimizer_alone(skipped, warned):
    trainer, directory, around = skipped
    assert [line["step"] for line in alarms_of(directory)] == [BAD_STEP]
    assert_same(around.before[BAD_STEP], around.after[BAD_STEP])
    for step in (BAD_STEP - 1, BAD_STEP + 1):
        moved = zip(around.before[step], around.after[step], strict=True)
        assert not any(torch.equal(a, b) for a, b in moved)
    # The step counts, for the learning rate, too.
    assert trainer.state.global_step == STEPS
    assert around.rates[BAD_STEP] < around.rates[BAD_STEP - 1]
    earlier = [trainer.state.log_history, warned[0].state.log_history]
    first, second = ([log["loss"] for log in x[:BAD_STEP]] for x in earlier)
    assert first == second


def test_a_skipped_step_drops_all_micro_batches_of_it(tmp_path):
    around = Around()
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run(tmp_path, recorder(), guard_of("skip"), around, **options)
    assert [line["step"] for line in alarms_of(tmp_path)] == [BAD_STEP]
    assert_same(around.before[BAD_STEP], around.after[BAD_STEP])


def test_quarantined_examples_have_no_part_in_later_epochs(tmp_path):
    run(tmp_path, recorder(), guard_of("quarantine"), num_train_epochs=2)
    first, *later = alarms_of(tmp_path)
    assert first["step"] == BAD_STEP
    out = {one["example_id"] for one in first["examples"]}
    assert {*BAD} <= out
    rows = load_sketches(tmp_path).where(epoch=1).dataset.with_format("torch")[:]
    ids = {one["example_id"] for line in later for one in line["examples"]}
    masked = torch.tensor([int(i) in out for i in rows["example_id"]])
    if len(out) == BATCH:  # nothing would be left of the batch
        assert [line["step"] for line in later if not line["reasons"]] == [
            BAD_STEP + STEPS
        ]
    else:
        assert bool((rows["weight"][masked] == 0).all())
        assert not bool(rows["sketch"][masked].any())
        others = rows["step"] == BAD_STEP + STEPS
        assert bool((rows["weight"][others & ~masked] > 0).all())
    assert ids.isdisjoint(out)


def test_a_batch_of_quarantined_examples_is_skipped(tmp_path):
    """All eight labels are wrong; in the second epoch nothing else stands out."""
    bad, around = range(BATCH * (BAD_STEP - 1), BATCH * BAD_STEP), Around()
    guard = guard_of("quarantine")

    class Lenient(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            guard.threshold = 1e9 if state.global_step else 3.0

    options = {"bad": bad, "num_train_epochs": 2}
    trainer = run(tmp_path, recorder(), guard, around, Lenient(), **options)
    first, again = alarms_of(tmp_path)
    assert {one["example_id"] for one in first["examples"]} == {*bad}
    assert (again["step"], again["reasons"]) == (BAD_STEP + STEPS, [])
    assert again["action"] == "quarantine"
    assert_same(around.before[again["step"]], around.after[again["step"]])
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_evaluation_counts_quarantined_examples(tmp_path):
    """It comes right after a batch from which training has left some out."""
    last = BAD_STEP + STEPS
    options = {"max_steps": last, "per_device_eval_batch_size": BATCH}
    trainer = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"), **options)
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, last
    with pytest.warns(UserWarning, match="no label from now on"):
        trainer.train()
    rows = load_sketches(tmp_path).where(step=last).dataset.with_format("torch")[:]
    assert 0 < int((rows["weight"] == 0).sum()) < BATCH
    model, data = trainer.model.eval(), trainer.train_dataset.with_format("torch")[:]
    with torch.no_grad():
        loss = model(data["x"], data["labels"])["loss"]
    (found,) = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    assert found == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("stop", [15, 25])
def test_resumed_training_compares_with_the_steps_before(tmp_path, stop):
    settings = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    whole = run(tmp_path / "a", recorder(), guard_of("quarantine"), **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop + 2

    run(tmp_path / "b", recorder(), guard_of("quarantine"), Stop(), **settings)
    checkpoint = str(tmp_path / "b" / f"checkpoint-{stop}")
    with (tmp_path / "b" / "guard.jsonl").open("a") as file:
        file.write('{"step": 18, "oppo')  # cut off by a kill
    parts = run(
        tmp_path / "b",
        recorder(),
        guard_of("quarantine"),
        resume=checkpoint,
        **settings,
    )
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    assert_same(weights_of(whole), weights_of(parts))


def test_the_logs_count_what_stood_out(warned):
    history = warned[0].state.log_history
    logs = [log for log in history if "loss" in log]
    assert [log["sketch/alarms"] for log in logs] == [
        int(step == BAD_STEP) for step in range(1, STEPS + 1)
    ]
    found = [log["sketch/opposition"] for log in logs]
    assert found == pytest.approx([x["opposition"] for x in lines_of(warned[1])])


def test_losses_alone_are_judged_without_a_guard_set(plain, tmp_path):
    around = Around()
    guard = GuardCallback(action="skip", window=WINDOW, threshold=5.0)
    trainer = guarded_trainer(tmp_path, recorder(), guard, around)
    with pytest.warns(UserWarning, match="Step 22 stands out: its loss is"):
        trainer.train()
    (line,) = alarms_of(tmp_path)
    assert (line["step"], line["reasons"]) == (BAD_STEP, ["loss"])
    assert {one["example_id"] for one in line["examples"]} == {*BAD}
    assert {line["opposition"] for line in lines_of(tmp_path)} == {None}
    assert_same(around.before[BAD_STEP], around.after[BAD_STEP])
    assert losses_of(trainer)[:BAD_STEP] == losses_of(plain)[:BAD_STEP]
    assert not any("sketch/opposition" in log for log in trainer.state.log_history)


def test_gradients_that_are_not_finite_stand_out_at_once(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weight = model.layers[0].weight.data
            if state.global_step == 3:
                self.kept = weight.clone()
                weight.fill_(float("nan"))
            if state.global_step == 4:
                weight.copy_(self.kept)

    around = Around()
    with pytest.warns(UserWarning, match="are NaN or infinite at step 4"):
        run(tmp_path, recorder(), guard_of("skip"), Breaks(), around, bad=())
    (line,) = alarms_of(tmp_path)
    assert (line["step"], line["reasons"]) == (4, ["not finite"])
    assert len(line["examples"]) == BATCH
    assert all(w.isfinite().all() for w in around.after[5])


@pytest.mark.parametrize("clips", [True, False])
def test_a_gradient_scaler_goes_on_after_a_skipped_step(clips):
    from types import SimpleNamespace

    from hf_sketch.callbacks.guarding.watch import forget_gradients

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    scaler = torch.amp.GradScaler("cpu")
    given = SimpleNamespace(optimizer=optimizer, scaler=scaler)
    for step in range(2):
        scaler.scale(weight.sum()).backward()
        if clips:
            scaler.unscale_(optimizer)
        if step == 0:
            args = SimpleNamespace(max_grad_norm=float(clips))
            forget_gradients([weight], given, args)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, torch.ones(2)) == (step == 0)
        optimizer.zero_grad()


def fails(directory, match, *callbacks, **arguments):
    trainer = guarded_trainer(directory, *callbacks, **arguments)
    with pytest.raises(ValueError, match=match):
        trainer.train()


def test_what_cannot_be_guarded_is_refused(tmp_path):
    fails(tmp_path, "has no GradientSketchCallback", guard_of())
    fails(tmp_path, "List it after", guard_of(), recorder())
    steps_only = GradientSketchCallback(48, per_example=False)
    fails(tmp_path, "Pass per_example=True", steps_only, guard_of())
    fails(tmp_path, "no examples", recorder(), GuardCallback([]))
    floats = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"))
    floats.data_collator = lambda rows: {
        "x": torch.tensor([row["x"] for row in rows]),
        "labels": torch.eye(2)[[row["labels"] for row in rows]],
    }
    with pytest.raises(ValueError, match="no integer labels"):
        floats.train()


def test_losses_outside_the_model_need_a_guard_set(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = guarded_trainer(tmp_path, recorder(), GuardCallback())
    trainer.compute_loss_func = loss
    with (
        pytest.warns(UserWarning, match="computed outside the model"),
        pytest.raises(ValueError, match="Pass queries to GuardCallback"),
    ):
        trainer.train()


def test_a_loss_that_counts_labels_of_minus_100_has_no_quarantine(tmp_path):
    trainer = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"))

    def forward(x, labels):
        logits = trainer.model.layers(x)
        own = logits.logsumexp(1) - logits.gather(1, labels.clamp(0)[:, None])[:, 0]
        return {"loss": own.mean(), "logits": logits}

    trainer.model.forward = forward
    trainer.args.measure_error = False
    with pytest.raises(ValueError, match="counts such examples"):
        trainer.train()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("every", 0), ("action", "stop"), ("threshold", -1.0), ("window", 9)],
)
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        guard_of(**{setting: value})
