"""What the callback adds to the Trainer's logs, and who sees it."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording.live import LiveLog
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.trained.training import tiny_dataset, tiny_trainer

KEYS = {"top_example", "top_share", "noise_scale", "alignment"}


class Logger(TrainerCallback):
    """Notes what reaches it, as TensorBoard's and W&B's callbacks do."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(dict(logs))


def sketch_logs(logs):
    return {name for name in logs if name.startswith("sketch/")}


def steps_of(store):
    """The weighted rows of each step and their sum, by the store alone."""
    rows, steps = store.dataset.with_format("torch")[:], sketch_matrix(store.steps)
    for number, step in enumerate(store.steps["step"][:]):
        own = rows["step"] == step
        parts = rows["weight"][own, None].float() * rows["sketch"][own]
        yield rows["example_id"][own], parts, parts.sum(0), steps[number]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that logs every second step, and a logger before the callback."""
    logger = Logger()
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("live"),
        logger,
        GradientSketchCallback(512),
        logging_steps=2,
        save_strategy="no",
        eval_strategy="epoch",
        eval_dataset=tiny_dataset(4),
    )
    trainer.train()
    return trainer, logger


def test_numbers_reach_loggers_before_the_callback_and_the_history(run):
    trainer, logger = run
    history = trainer.state.log_history
    training = [logs for logs in history if "loss" in logs]
    seen = [logs for logs in logger.seen if "loss" in logs]
    assert len(training) == len(seen) == 3
    for logs, noted in zip(training, seen, strict=True):
        assert {f"sketch/{key}" for key in KEYS - {"noise_scale"}} <= sketch_logs(logs)
        assert sketch_logs(logs) == sketch_logs(noted)
        assert isinstance(logs["sketch/top_example"], int)
    others = [logs for logs in history if "loss" not in logs]
    assert any("eval_loss" in logs for logs in others)
    assert not any(map(sketch_logs, others))


def test_numbers_are_those_of_the_recorded_rows(run):
    trainer, _ = run
    steps = list(steps_of(load_sketches(trainer.args.output_dir)))
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    compared = 0
    for place, logs in enumerate(logged):
        top, cosines, noise, signal = (-9.0, None), [], 0.0, 0.0
        for number in (2 * place, 2 * place + 1):
            ids, parts, gradient, row = steps[number]
            shares = parts @ gradient / gradient.square().sum()
            top = max(top, *zip(shares.tolist(), ids.tolist(), strict=True))
            if number:
                before = steps[number - 1][3]
                cosines.append(float(before @ row / before.norm() / row.norm()))
            count = len(parts)
            deviations = count * parts - gradient  # of the contributions, whose mean
            trace = float(deviations.square().sum()) / (count - 1)
            noise += trace
            signal += float(gradient.square().sum()) - trace / count
        assert logs["sketch/top_example"] == top[1]
        assert logs["sketch/top_share"] == pytest.approx(top[0], abs=1e-4)
        mean = sum(cosines) / len(cosines)
        assert logs["sketch/alignment"] == pytest.approx(mean, abs=1e-4)
        assert ("sketch/noise_scale" in logs) == (signal > 0)
        if signal > 0:
            compared += 1
            assert logs["sketch/noise_scale"] == pytest.approx(noise / signal, rel=1e-2)
    assert compared


def test_a_trainer_of_its_own_sees_them_and_is_left_as_it_was(tmp_path):
    class Counting(Trainer):
        def log(self, logs, start_time=None):
            logs["seen"] = float(len(sketch_logs(logs)))
            super().log(logs, start_time)

    trainer = tiny_trainer(tmp_path, GradientSketchCallback(64), max_steps=2)
    trainer.__class__ = Counting
    trainer.train()
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [logs["seen"] >= 2 for logs in history] == [True, True]
    assert "log" not in vars(trainer)


@pytest.mark.parametrize(
    ("options", "keys"),
    [({"per_example": False}, {"alignment"}), ({"per_step": False}, set())],
    ids=str,
)
def test_rows_of_one_kind_tell_what_they_can(tmp_path, options, keys):
    callback = GradientSketchCallback(64, **options)
    trainer = tiny_trainer(tmp_path, callback, max_steps=2, save_strategy="no")
    trainer.train()
    first, second = (logs for logs in trainer.state.log_history if "loss" in logs)
    assert sketch_logs(first) == set()
    assert sketch_logs(second) == {f"sketch/{key}" for key in keys}


def test_a_gradient_that_is_not_finite_is_not_logged(tmp_path):
    class Breaking(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).grad.fill_(torch.inf)

    trainer = tiny_trainer(
        tmp_path,
        Breaking(),
        GradientSketchCallback(64),
        max_steps=2,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    trainer.train()
    _, second = (logs for logs in trainer.state.log_history if "loss" in logs)
    assert sketch_logs(second) == set()


def test_a_process_that_sees_half_of_the_examples_knows_their_number():
    """tr(Sigma) by the mean square of its examples, |G|^2 by the step of all."""

    class Logging:
        def log(self, logs):
            self.logged = logs

    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 2
    step = {"sketch": rows.mean(0)[None], "clip_factor": torch.ones(1)}
    trainer, live = Logging(), LiveLog(processes=2)
    end = live.watch(trainer)
    weights = torch.full((3,), 1 / 6).double()
    live.add_examples(
        {"example_id": torch.arange(3), "weight": weights, "sketch": rows[:3]}
    )
    live.end_step(step)
    trainer.log({"loss": 1.0})
    square = float(rows.mean(0).square().sum())
    trace = (float(rows[:3].square().sum(1).mean()) - square) * 6 / 5
    found = trainer.logged["sketch/noise_scale"]
    assert found == pytest.approx(trace / (square - trace / 6), rel=1e-4)
    parts = {"part": torch.arange(3), "example_id": torch.arange(3), "weight": weights}
    live.start_step()
    live.add_examples({**parts, "sketch": rows[:3]})
    live.end_step(step)
    trainer.log({"loss": 1.0})
    assert "sketch/top_share" in trainer.logged
    assert "sketch/noise_scale" not in trainer.logged  # parts of one are not apart
    end()
    trainer.log({"loss": 1.0})
    assert trainer.logged == {"loss": 1.0}
