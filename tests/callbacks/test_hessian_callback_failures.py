"""Whatever goes wrong with spectra, training goes on as if they were not taken."""

import errno
import math

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import hf_sketch.callbacks.placement as placement
import hf_sketch.spectra.files as files
from hf_sketch import load_spectra
from hf_sketch.callbacks import HessianSpectrumCallback
from hf_sketch.spectra.files import save_spectrum
from tests.helpers.spectra import made_of
from tests.helpers.tiers import full
from tests.helpers.trained.hessian_training import (
    assert_trained_alike,
    spectra_callback,
    steps_of,
    train,
)

SHORT = {"max_steps": 3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), **SHORT)


def failing(error):
    def loss_fn(output, inputs):
        raise error

    return loss_fn


FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    *full(NotImplementedError("derivative"), ZeroDivisionError(), MemoryError()),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_loss_that_fails_warns_and_training_goes_on(tmp_path, plain, error):
    callback = spectra_callback((0, 3), loss_fn=failing(error))
    with pytest.warns(UserWarning, match="missing; training continues") as caught:
        # A batch that is too large for the memory would be made smaller.
        trainer = train(tmp_path, callback, auto_find_batch_size=True, **SHORT)
    messages = [str(w.message) for w in caught if "Hessian" in str(w.message)]
    for message, step in zip(messages, (0, 3), strict=True):
        assert message.startswith(f"The Hessian's spectrum of step {step} is missing; ")
        assert "training continues. " in message
    assert trainer._train_batch_size == 4
    assert_trained_alike(plain, trainer)
    with pytest.raises(FileNotFoundError, match="No spectra at"):
        load_spectra(tmp_path)


def test_a_mistake_in_the_code_of_the_loss_ends_training(tmp_path):
    callback = spectra_callback((0,), loss_fn=failing(KeyError("logits")))
    with pytest.raises(KeyError, match="logits"):
        train(tmp_path, callback, **SHORT)


def test_a_directory_that_cannot_be_made_warns_and_training_goes_on(tmp_path, plain):
    (tmp_path / "curvature").write_text("a file where the directory should be")
    message = "No Hessian spectra; training continues. FileExistsError: .*curv"
    with pytest.warns(UserWarning, match=message):
        trainer = train(tmp_path, spectra_callback(), **SHORT)
    assert_trained_alike(plain, trainer)


def test_a_full_disk_warns_and_training_goes_on(tmp_path, plain, monkeypatch):
    replace_file = files.replace_file

    def full(path, data):
        if path.name.startswith("step-00000002"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        replace_file(path, data)

    monkeypatch.setattr(files, "replace_file", full)
    message = (
        "spectrum of step 2 is missing; training continues. OSError.*No space left"
    )
    with pytest.warns(UserWarning, match=message):
        trainer = train(tmp_path, spectra_callback((0, 2, 3)), **SHORT)
    assert steps_of(tmp_path) == [0, 3]
    assert_trained_alike(plain, trainer)


def test_weights_that_are_not_finite_warn_and_training_goes_on(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.classifier.bias[0] = math.nan

    message = "spectrum of step 1 is missing; .*a finite loss, got nan. Look for"
    with pytest.warns(UserWarning, match=message):
        train(tmp_path, Poison(), spectra_callback((1,)), max_steps=1)


def resumed_with_a_warning(tmp_path, callback, message):
    with pytest.warns(UserWarning, match=message):
        trainer = train(tmp_path, callback, max_steps=3, resume=True)
    assert trainer.state.global_step == 3


@pytest.fixture
def two_steps(tmp_path):
    train(tmp_path, spectra_callback((0, 2)), max_steps=2)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"out_size": 32},
            r"holds spectra of .*out_size=64.*this run has .*out_size=32.*Pass the",
        ),
        ({"operator": "affd"}, "operator='srht'.*this run has .*operator='affd'"),
        (
            {"seed": 8},
            r"seed=7, but .*seed=8\. Pass the settings of the run that you res",
        ),
    ],
    ids=str,
)
def test_spectra_of_another_sketch_are_kept_and_none_are_added(
    two_steps, options, message
):
    callback = spectra_callback((0, 2, 3), **options)
    resumed_with_a_warning(two_steps, callback, f"No Hessian spectra.*{message}")
    assert steps_of(two_steps) == [0, 2]


def test_spectra_of_another_model_are_kept_and_none_are_added(two_steps):
    save_spectrum(two_steps / "curvature", made_of(step=2))
    message = r"spectra of 1 parameters with 1000 elements.*has 41 parameters with"
    resumed_with_a_warning(two_steps, spectra_callback((0, 2, 3)), message)
    assert steps_of(two_steps) == [0, 2]


@pytest.mark.parametrize("name", ["batches.safetensors", "step-00000002.json"])
def test_damaged_files_are_reported_when_training_resumes(two_steps, name):
    path = two_steps / "curvature" / name
    path.write_bytes(path.read_bytes()[:-9])
    message = f"No Hessian spectra.*ValueError.*{name} .*[.;] [rR]estore it"
    resumed_with_a_warning(two_steps, spectra_callback((0, 2, 3)), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1 or None, got 0"),
        ({"batches": 0}, "batches must be an integer of at least 1, got 0"),
        ({"batches": []}, r"list of at least one input of the model .*, got \[\]"),
        (
            {"krylov_dim": 65},
            r"in \[1, out_size=64\], got 65: pass a smaller krylov_dim",
        ),
        ({"batches": "3"}, "batches must be the number of .*, got '3'"),
        ({"krylov_dim": 0}, "krylov_dim must be an integer of at least 1, got 0"),
        ({"out_size": 64.0}, r"out_size must be an integer .*, got 64\.0"),
        ({"loss_fn": 5}, "loss_fn must be a function or None, got 5"),
        ({"seed": []}, r"seed must be an integer .* or None, got \[\]"),
        ({"every": "3"}, "every must be an integer .* or None, got '3'"),
        ({"operator": "jl"}, r"operator must be one of .*got 'jl'"),
        ({"layout": "round"}, r"layout must be one of .*got 'round'"),
        ({"mode": "hvp"}, r"mode must be one of .*got 'hvp'"),
        ({"unit": "words"}, r"unit must be one of .*got 'words'"),
        ({"keep_vectors": -1}, "keep_vectors must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer .* or None, got 0"),
        ({"steps": (0, -1)}, r"steps must be a list of .*at least 0, got \(0, -1\)"),
        ({"steps": "3"}, "steps must be a list of integers .*, got '3'"),
        ({"steps": 5}, "steps must be a list of integers .*, got 5"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        spectra_callback(**options)


def test_models_with_too_few_parameters_or_none_are_refused(tmp_path):
    callback = HessianSpectrumCallback((0,), out_size=10**6)
    with pytest.warns(
        UserWarning, match=r"No Hessian spectra.*out_size must be in \[1"
    ):
        train(tmp_path, callback, max_steps=1)


def test_a_sharded_model_is_refused(tmp_path, plain, monkeypatch):
    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(placement, "AcceleratorState", Sharded)
    message = "No Hessian spectra; .*ValueError: HessianSpectrumCallback .* FSDP"
    with pytest.warns(UserWarning, match=message):
        trainer = train(tmp_path, spectra_callback(), **SHORT)
    assert_trained_alike(plain, trainer)
