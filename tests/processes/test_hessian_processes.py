"""Several processes take the spectra that one takes of the same batches."""

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
from tests.helpers.processes.joint_training import STEPS
from tests.helpers.processes.launching import (
    assert_bit_equal_training,
    in_two_and_four,
    results,
    run_together,
)
from tests.helpers.trained.hessian_training import stored_batches
from tests.helpers.trained.text_training import undropped
from tests.helpers.trained.training import tiny_bert

pytestmark = pytest.mark.xdist_group("processes")


def one_process(directory, model, step, mode):
    """The spectrum of all stored batches, at the weights that training had."""
    model.load_state_dict(torch.load(directory / f"at-{step}"))
    sketch = ModelSketch.from_model(model, 64, "blocked", 7, "srht")
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


@in_two_and_four("joint/spectra")
def test_spectra_are_those_of_one_process_on_the_stored_batches(launched, processes):
    assert_spectra_of_one_process(launched / "spectra", tiny_bert())


@in_two_and_four("joint/weighted")
def test_processes_count_by_the_tokens_of_their_batches(launched, processes):
    tokens = [
        int((batch["labels"][:, 1:] != -100).sum())
        for batch in stored_batches(launched / "weighted")
    ]
    assert len(set(tokens)) == 3
    assert_spectra_of_one_process(launched / "weighted", undropped("gpt2"))


@pytest.mark.in_processes(2, "joint/differences")
def test_finite_differences_take_a_step_of_their_own_in_each_process(launched):
    settings = {"mode": "finite_difference", "tolerance": 1e-3}
    assert_spectra_of_one_process(
        launched / "differences", undropped("gpt2"), **settings
    )


@pytest.mark.in_processes(2, "joint/unlabelled")
def test_a_process_whose_batches_have_no_label_counts_for_nothing(launched):
    assert_spectra_of_one_process(launched / "unlabelled", undropped("gpt2"))


@pytest.mark.in_processes(
    2, "joint/plain", "joint/spectra", "joint/failing", "joint/unwritable"
)
def test_training_is_bit_equal_with_and_without_also_where_spectra_fail(launched):
    assert_bit_equal_training(launched, "spectra", "failing", "unwritable")


@pytest.mark.in_processes(2, "joint/spectra")
def test_all_processes_log_the_same_numbers(launched):
    first, second = results(launched / "spectra", "logs")
    assert [entry["step"] for entry in first] == list(STEPS)
    assert first == second


@pytest.mark.in_processes(2, "joint/spectra", "joint/resumed")
def test_resumed_spectra_are_those_of_an_uninterrupted_run(launched):
    pairs = zip(
        load_spectra(launched / "resumed"),
        load_spectra(launched / "spectra"),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.step == theirs.step
        assert torch.equal(mine.sketched, theirs.sketched)


def assert_warned(directory, expected):
    """Each process gave its warnings, in this order."""
    for messages, patterns in zip(
        results(directory, "warnings"), expected, strict=True
    ):
        assert len(messages) == len(patterns)
        for message, pattern in zip(messages, patterns, strict=True):
            assert re.search(pattern, message), message


@pytest.mark.in_processes(2, "joint/failing")
def test_what_fails_in_one_process_is_missing_in_all_and_training_goes_on(launched):
    missing = "spectrum of step {} is missing; training continues. "
    other = missing + "OtherProcessFailedError: it failed in another"
    own = missing + "OSError.*No space left"
    assert_warned(
        launched / "failing",
        [
            [other.format(0), own.format(2)],
            [missing.format(0) + "MemoryError", other.format(2)],
        ],
    )
    assert [spectrum.step for spectrum in load_spectra(launched / "failing")] == [3]


@pytest.mark.in_processes(2, "joint/unwritable")
def test_a_directory_that_the_first_process_cannot_make_warns_in_all(launched):
    none = "No Hessian spectra; training continues. "
    other = none + "OtherProcessFailedError: it failed in another process"
    assert_warned(launched / "unwritable", [[none + "FileExistsError"], [other]])


@pytest.mark.full
def test_a_process_that_dies_takes_the_others_down_within_a_minute(tmp_path):
    code, errors, seconds = run_together(2, tmp_path, ["joint/broken"])
    assert code != 0
    assert "OddError: an odd end" in errors
    assert seconds < 60


@pytest.mark.in_processes(2, "joint/unlike")
def test_processes_with_other_settings_take_no_spectra(launched):
    for texts in results(launched / "unlike", "warnings"):
        wanted = "disagree on krylov_dim of HessianSpectrumCallback (4, 5). Pass"
        assert any(wanted in text for text in texts)
    for error in results(launched / "unlike", "error"):
        assert "stage_steps of IntrinsicDimensionCallback (3, 4). Pass" in error
    assert not (launched / "unlike" / "curvature").exists()
