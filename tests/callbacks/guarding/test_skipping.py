"""Steps that stand out are skipped, or their examples left out from then on."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_sketch import load_sketches
from hf_sketch.callbacks.guarding.watch import forget_gradients
from tests.helpers.trained.guarded_training import (
    BAD,
    BAD_STEP,
    BATCH,
    STEPS,
    Around,
    alarms_of,
    assert_same,
    guard_of,
    guarded_trainer,
    recorder,
    run,
)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    directory, around = tmp_path_factory.mktemp("skipped"), Around()
    return run(directory, recorder(), guard_of("skip"), around), directory, around


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


def test_steps_without_rows_leave_quarantined_examples_out(tmp_path):
    guard, around, step = guard_of("quarantine", threshold=1e9), Around(), 23

    class Quarantining(TrainerCallback):
        def on_train_begin(self, *event, **kwargs):
            guard._watch._quarantined |= {*range(BATCH * (step - 1), BATCH * step)}

    callbacks = recorder(every_steps=2), guard, Quarantining(), around
    run(tmp_path, *callbacks, bad=())
    assert_same(around.before[step], around.after[step])
    for other in (step - 1, step + 1):
        moved = zip(around.before[other], around.after[other], strict=True)
        assert not any(torch.equal(a, b) for a, b in moved)


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


@pytest.mark.parametrize("clips", [True, False])
def test_a_gradient_scaler_goes_on_after_a_skipped_step(clips):
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
