"""Steps that stand out are found before the optimizer makes them."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.callbacks import GuardCallback
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.tiers import full
from tests.helpers.trained.guarded_training import (
    BAD,
    BAD_STEP,
    BATCH,
    STEPS,
    WINDOW,
    Around,
    alarms_of,
    assert_same,
    guard_of,
    guarded_trainer,
    lines_of,
    losses_of,
    recorder,
    run,
    separable,
    weights_of,
)


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


def test_evaluation_keeps_its_own_examples_with_persistent_workers(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = guarded_trainer(
        tmp_path, recorder(), guard_of("quarantine"), max_steps=2, **options
    )
    trainer.eval_dataset = separable(40, 3)
    trainer.compute_metrics = lambda found: {"examples": len(found.label_ids)}
    trainer.train()
    assert trainer.evaluate()["eval_examples"] == 40
    sketch = load_sketches(tmp_path).model_sketch
    queries = sketch_dataset(
        trainer=trainer, dataset=separable(6, 4), model_sketch=sketch
    )
    assert len(queries) == 6
    assert trainer.evaluate()["eval_examples"] == 40
    assert trainer.args.dataloader_persistent_workers


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


@pytest.mark.parametrize("stop", [25, *full(15)])
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
