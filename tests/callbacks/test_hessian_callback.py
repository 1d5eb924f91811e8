import copy
import dataclasses
import json
import math

import pytest
import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

import hf_sketch.callbacks.hessian as module
from hf_sketch import (
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    load_spectra,
)
from hf_sketch.callbacks import GradientSketchCallback, HessianSpectrumCallback
from tests.helpers.rows import rows_of
from tests.helpers.spectra import assert_equal, made_of
from tests.helpers.tiers import full
from tests.helpers.trained.hessian_training import (
    assert_trained_alike,
    spectra_callback,
    steps_of,
    stored_batches,
    train,
)
from tests.helpers.trained.training import (
    Interrupt,
    tiny_bert,
    tiny_dataset,
    tiny_trainer,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Training without the callback, with dropout, accumulation and clipping."""
    return train(tmp_path_factory.mktemp("plain"))


class Weights(TrainerCallback):
    """Keeps those of each step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.of = {0: copy.deepcopy(model.state_dict())}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.of[state.global_step] = copy.deepcopy(model.state_dict())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Training with it."""
    directory, weights = tmp_path_factory.mktemp("watched"), Weights()
    callback = spectra_callback((0, 2, 3, 5), krylov_dim=6)
    trainer = train(directory, weights, callback, save_total_limit=1)
    return directory, trainer, weights.of


def test_training_is_bit_equal_with_and_without(plain, watched):
    directory, trainer, _ = watched
    assert_trained_alike(plain, trainer)
    assert steps_of(directory) == [0, 2, 3, 5]  # rotation leaves them alone
    assert len(list(directory.glob("checkpoint-*"))) == 1
    assert not any(m._forward_hooks for m in trainer.model.modules())


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("autograd", {"bf16": True}),
        ("finite_difference", {"gradient_accumulation_steps": 1, **EVALUATED}),
        *full(
            ("finite_difference", {"bf16": True}),
            ("autograd", {"label_smoothing_factor": 0.1, "dataloader_num_workers": 1}),
        ),
    ],
    ids=str,
)
def test_training_is_bit_equal_whatever_its_settings(tmp_path, mode, arguments):
    arguments = {"max_steps": 2, "eval_dataset": tiny_dataset(4), **arguments}
    alone = train(tmp_path / "alone", **arguments)
    trainer = train(tmp_path / "both", spectra_callback((0, 1), mode=mode), **arguments)
    assert_trained_alike(alone, trainer)
    assert steps_of(tmp_path / "both") == [0, 1]


@pytest.mark.parametrize(
    ("first", "mode"), [(True, "finite_difference"), *full((False, "autograd"))]
)
def test_rows_of_the_gradient_callback_are_the_same_beside_it(tmp_path, first, mode):
    alone = train(tmp_path / "alone", GradientSketchCallback(64), max_steps=2)
    both = [spectra_callback((0, 1, 2), mode=mode), GradientSketchCallback(64)]
    trainer = train(tmp_path / "both", *(both if first else both[::-1]), max_steps=2)
    assert_trained_alike(alone, trainer)
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "both")
    assert steps_of(tmp_path / "both") == [0, 1, 2]


def test_spectra_are_of_the_model_at_their_step_on_batches_of_the_training_set(watched):
    directory, _, weights = watched
    batches = stored_batches(directory)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert [len(batch["labels"]) for batch in batches] == [4, 4]
    numbers = rows[:, 0] - 1
    assert len(numbers.unique()) == 8
    assert torch.equal(rows, torch.tensor(tiny_dataset()[numbers]["input_ids"]))
    model = tiny_bert()
    for spectrum in load_spectra(directory):
        model.load_state_dict(weights[spectrum.step])
        sketch = ModelSketch.from_model(model, 64, "blocked", 7, "srht")
        operator = SketchedHessian(HessianOperator(model, batches), sketch)
        wanted = hessian_spectrum(
            operator, 6, step=spectrum.step, keep_vectors=4, seed=7, progress=False
        )
        # The check is of the first product of all, before step 1.
        wanted = dataclasses.replace(wanted, check=spectrum.check)
        assert_equal(spectrum, wanted)


def test_steps_are_those_asked_for_and_by_default_the_papers(tmp_path, monkeypatch):
    def taken_of(*arguments, upto):
        taken = []

        def note(operator, krylov_dim, *, step, **kwargs):
            taken.append(step)
            return made_of(step=step)

        monkeypatch.setattr(module, "hessian_spectrum", note)
        callback = HessianSpectrumCallback(*arguments, batches=1, out_size=100)
        trainer = tiny_trainer(tmp_path / str(arguments), callback)
        state, control = TrainerState(max_steps=upto), TrainerControl()
        callback.on_train_begin(
            trainer.args,
            state,
            control,
            model=trainer.model,
            train_dataloader=trainer.get_train_dataloader(),
        )
        for step in range(1, upto + 1):
            state.global_step = step
            callback.on_step_end(trainer.args, state, control)
        return taken

    paper = [0, 10, 50, 100, 150, 200, 250, 500, 1000, 2000]
    assert taken_of(upto=2500) == paper
    assert taken_of([0, 3], upto=5) == [0, 3]
    assert taken_of(None, 2, upto=5) == [0, 2, 4]
    assert taken_of((1, 4), 3, upto=6) == [0, 1, 3, 4, 6]


def curvature_logs(entries):
    return [entry for entry in entries if "curvature_rneg" in entry]


def test_statistics_are_logged_in_the_history(watched):
    directory, trainer, _ = watched
    logged = curvature_logs(trainer.state.log_history)
    for entry, spectrum in zip(logged, load_spectra(directory), strict=True):
        assert entry["step"] == spectrum.step
        assert entry["curvature_rneg"] == spectrum.rneg
        assert entry["curvature_outliers"] == spectrum.outliers
        alignment = entry.get("curvature_alignment", math.nan)
        assert alignment == pytest.approx(spectrum.alignment, nan_ok=True)
        assert entry["curvature_trace"] == spectrum.trace.value
        assert entry["curvature_least_eigenvalue"] == spectrum.eigenvalues[0]
        for place in (1, 5):
            value = spectrum.eigenvalues[-place]
            assert entry[f"curvature_eigenvalue_{place}"] == value
        json.dumps(entry, allow_nan=False)  # as it goes to trainer_state.json


class Reporter(TrainerCallback):
    """Keeps what is logged, as TensorBoard and others get it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def test_the_trainer_that_is_set_logs_to_its_reporters_too(tmp_path, watched, plain):
    reporter, callback = Reporter(), spectra_callback((0, 2, 3, 5), krylov_dim=6)
    trainer = tiny_trainer(tmp_path, reporter, callback)
    callback.set_trainer(trainer)
    trainer.train()
    expected = curvature_logs(watched[1].state.log_history)
    assert curvature_logs(reporter.logs) == expected
    assert curvature_logs(trainer.state.log_history) == expected
    assert_trained_alike(plain, trainer)  # also the losses of the same steps
    losses = [entry["step"] for entry in reporter.logs if "loss" in entry]
    assert losses == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [3, *full(5)])
def test_resumed_training_ends_with_the_spectra_of_uninterrupted(
    tmp_path, step, watched
):
    def callback(**options):
        return spectra_callback((0, 2, 3, 5), krylov_dim=6, **options)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback(), Interrupt(step))
    assert max(steps_of(tmp_path)) == step
    assert any(tmp_path.glob("checkpoint-*"))
    stored = (tmp_path / "curvature" / "batches.safetensors").read_bytes()
    seen = Seen(tmp_path)
    # What there is to draw does not matter any more.
    resumed = callback(batches=1, batch_size=2)
    trainer = train(tmp_path, resumed, seen, resume=str(tmp_path / "checkpoint-2"))
    assert seen.steps == [0, 2]  # later ones are dropped
    pairs = zip(load_spectra(tmp_path), load_spectra(watched[0]), strict=True)
    for mine, theirs in pairs:
        fields = dataclasses.replace(mine, check=theirs.check)
        assert_equal(fields, theirs)
    assert (tmp_path / "curvature" / "batches.safetensors").read_bytes() == stored
    assert_trained_alike(watched[1], trainer)


class Seen(TrainerCallback):
    """Notes what spectra there are when training begins."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = steps_of(self.directory)


def test_a_checkpoint_from_before_the_callback_starts_the_spectra(tmp_path):
    train(tmp_path, max_steps=2)
    train(tmp_path, spectra_callback((0, 3)), max_steps=3, resume=True)
    assert steps_of(tmp_path) == [3]


def test_a_new_run_sets_the_spectra_of_an_earlier_one_aside(tmp_path, watched):
    for number in (1, 2):
        callback = spectra_callback((0,), batches=number)
        if number == 1:
            train(tmp_path, callback, max_steps=1)
            continue
        message = r"held spectra of an earlier run .*now in .*curvature-before-1\."
        with pytest.warns(UserWarning, match=message):
            train(tmp_path, callback, max_steps=1)
    assert len(stored_batches(tmp_path)) == 2
    assert steps_of(tmp_path) == [0]
    assert (tmp_path / "curvature-before-1" / "step-00000000.json").is_file()


def test_a_new_run_does_not_take_the_batches_of_a_run_without_spectra(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, spectra_callback((5,), batches=1), Interrupt(1), max_steps=5)
    assert len(stored_batches(tmp_path)) == 1
    train(tmp_path, spectra_callback((1,), batches=2), max_steps=1)
    assert len(stored_batches(tmp_path)) == 2
