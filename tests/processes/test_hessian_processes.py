"""Several processes take the spectra that one takes of the same batches.

Training runs in processes of their own, by tests/helpers/joint_training.py.
"""

import re

import pytest
import torch

from hf_sketch import (
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    load_spectra,
)
from tests.helpers.hessian_training import stored_batches
from tests.helpers.joint_training import MODULE, STEPS
from tests.helpers.launching import TORCHRUN, launch, run_together, told
from tests.helpers.text_training import undropped
from tests.helpers.training import tiny_bert

IN_TWO = ("plain", "spectra", "weighted", "differences", "unlabelled", "resumed")
IN_TWO += ("failing", "unwritable", "unlike")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave."""
    return launch(TORCHRUN, 2, tmp_path_factory.mktemp("two"), IN_TWO, MODULE)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes leave, of which one has no batch."""
    directory = tmp_path_factory.mktemp("four")
    return launch(TORCHRUN, 4, directory, ("spectra", "weighted"), MODULE)


@pytest.fixture
def left(request):
    return request.getfixturevalue(request.param)


def one_process(directory, model, step, mode):
    """The spectrum of all stored batches, at the weights that training had."""
    model.load_state_dict(torch.load(directory / f"at-{step}"))
    sketch = ModelSketch.from_model(model, 64, "blocked", 7, "affd")
    hessian = HessianOperator(model, stored_batches(directory), mode=mode)
    return hessian_spectrum(
        SketchedHessian(hessian, sketch), 6, keep_vectors=4, seed=7, progress=False
    )


def assert_spectra_of_one_process(directory, model, mode="autograd", tolerance=1e-6):
    """Up to the rounding of float32 sums, which are taken in another order."""
    spectra = load_spectra(directory)
    assert [spectrum.step for spectrum in spectra] == list(STEPS)
    for spectrum in spectra:
        expected = one_process(directory, model, spectrum.step, mode)
        assert spectrum.mode == mode
        largest = float(expected.sketched.abs().max())
        torch.testing.assert_close(
            spectrum.sketched, expected.sketched, rtol=0, atol=tolerance * largest
        )
        assert spectrum.loss == pytest.approx(expected.loss, rel=1e-6)
        error = (spectrum.gradient - expected.gradient).norm()
        assert error < 1e-5 * expected.gradient.norm()


@pytest.mark.parametrize("left", ["two", "four"], indirect=True)
def test_spectra_are_those_of_one_process_on_the_stored_batches(left):
    assert_spectra_of_one_process(left / "spectra", tiny_bert())


@pytest.mark.parametrize("left", ["two", "four"], indirect=True)
def test_processes_count_by_the_tokens_of_their_batches(left):
    tokens = [
        int((batch["labels"][:, 1:] != -100).sum())
        for batch in stored_batches(left / "weighted")
    ]
    assert len(set(tokens)) == 3
    assert_spectra_of_one_process(left / "weighted", undropped("gpt2"))


def test_finite_differences_take_a_step_of_their_own_in_each_process(two):
    settings = {"mode": "finite_difference", "tolerance": 1e-3}
    assert_spectra_of_one_process(two / "differences", undropped("gpt2"), **settings)


def test_a_process_whose_batches_have_no_label_counts_for_nothing(two):
    assert_spectra_of_one_process(two / "unlabelled", undropped("gpt2"))


def test_training_is_bit_equal_with_and_without_also_where_spectra_fail(two):
    for scenario in ("spectra", "failing", "unwritable"):
        assert told(two / "plain", "curve") == told(two / scenario, "curve")
        for rank in (0, 1):
            plain, watched = (
                torch.load(two / name / f"weights-{rank}.pt")
                for name in ("plain", scenario)
            )
            assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_all_processes_log_the_same_numbers(two):
    first, second = told(two / "spectra", "logs")
    assert [entry["step"] for entry in first] == list(STEPS)
    assert first == second


def test_resumed_spectra_are_those_of_an_uninterrupted_run(two):
    pairs = zip(
        load_spectra(two / "resumed"), load_spectra(two / "spectra"), strict=True
    )
    for mine, theirs in pairs:
        assert mine.step == theirs.step
        assert torch.equal(mine.sketched, theirs.sketched)


def assert_warned(directory, expected):
    """Each process gave its warnings, in this order."""
    for messages, patterns in zip(told(directory, "warnings"), expected, strict=True):
        assert len(messages) == len(patterns)
        for message, pattern in zip(messages, patterns, strict=True):
            assert re.search(pattern, message), message


def test_what_fails_in_one_process_is_missing_in_all_and_training_goes_on(two):
    missing = "spectrum of step {} is missing; training continues. "
    other = missing + "OtherProcessFailedError: it failed in another"
    own = missing + "OSError.*No space left"
    assert_warned(
        two / "failing",
        [
            [other.format(0), own.format(2)],
            [missing.format(0) + "MemoryError", other.format(2)],
        ],
    )
    assert [spectrum.step for spectrum in load_spectra(two / "failing")] == [3]


def test_a_directory_that_the_first_process_cannot_make_warns_in_all(two):
    none = "No Hessian spectra; training continues. "
    other = none + "OtherProcessFailedError: it failed in another process"
    assert_warned(two / "unwritable", [[none + "FileExistsError"], [other]])


def test_a_process_that_dies_takes_the_others_down_within_a_minute(tmp_path):
    run = run_together(TORCHRUN, 2, tmp_path, ["broken"], MODULE)
    code, errors, seconds = run
    assert code != 0
    assert "OddError: an odd end" in errors
    assert seconds < 60


def test_processes_with_other_settings_go_without(two):
    refused = "needs the same settings in all processes, got"
    for texts in told(two / "unlike", "warnings"):
        wanted = f"HessianSpectrumCallback {refused} krylov_dim=4, 5: pass"
        assert any(wanted in text for text in texts)
    for error in told(two / "unlike", "error"):
        assert f"IntrinsicDimensionCallback {refused} stage_steps=3, 4: pass" in error
    assert not (two / "unlike" / "curvature").exists()
