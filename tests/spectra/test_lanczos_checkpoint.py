import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_sketch.spectra.basis as lanczos_basis
import hf_sketch.spectra.checkpoint as lanczos_checkpoint
from hf_sketch.durable import read_sealed, write_sealed
from hf_sketch.spectra.checkpoint import ROWS, STATE
from tests.helpers.lanczos_runs import SIZE, STEPS, assert_same_bits, operator, run
from tests.helpers.operators.symmetric import Diagonal, Matrix, goe, normals
from tests.helpers.tiers import full


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "a" / "checkpoint"


def killed_at(step, directory, copy, **arguments):
    """What lies on disk at the moment of a product: what kill -9 would leave."""

    def spoil(v):
        shutil.copytree(directory, copy)
        return v

    watched = operator(spoilt_product=step, spoil=spoil)
    run(watched, STEPS, checkpoint=directory, **arguments)


@pytest.mark.parametrize("step", [1, 9, 24, *full(2, 8, 10, 23)])
@pytest.mark.parametrize("every", [1, 7, *full(4)])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    step, every, directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", 5 * SIZE)
    copy = tmp_path / "copy"
    killed_at(step, directory, copy, checkpoint_every=every)
    resumed = operator()
    result = run(resumed, STEPS, checkpoint=copy, checkpoint_every=every)
    assert resumed.products == STEPS - (step - 1) // every * every
    assert_same_bits(result, run(operator(), STEPS))
    assert_same_files(copy, directory)


def assert_same_files(left, right):
    for name in (STATE, ROWS):
        assert (left / name).read_bytes() == (right / name).read_bytes()


def test_a_run_that_was_killed_again_and_again_resumes(directory):
    def kill(v):
        raise KeyboardInterrupt

    for number in range(STEPS):
        killed = operator(spoilt_product=2, spoil=kill)
        with pytest.raises(KeyboardInterrupt):
            run(killed, STEPS + 1, checkpoint=directory)
        assert len(read_sealed(directory / STATE)["alphas"]) == number + 1
    result = run(operator(), STEPS, checkpoint=directory)
    assert_same_bits(result, run(operator(), STEPS))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_loses_no_step(error, directory):
    def interrupt(v):
        raise error

    broken = operator(spoilt_product=10, spoil=interrupt)
    with pytest.raises(error):
        run(broken, STEPS, checkpoint=directory, checkpoint_every=100)
    resumed = operator()
    result = run(resumed, STEPS, checkpoint=directory, checkpoint_every=100)
    assert resumed.products == STEPS - 9
    assert_same_bits(result, run(operator(), STEPS))


def test_a_product_that_is_not_finite_loses_no_step(directory):
    broken = operator(spoilt_product=10, spoil=lambda v: v * math.nan)
    with pytest.raises(FloatingPointError, match=r"step 10 .*holds 9 steps\."):
        run(broken, STEPS, checkpoint=directory)
    resumed = operator()
    result = run(resumed, STEPS, checkpoint=directory)
    assert resumed.products == STEPS - 9
    assert_same_bits(result, run(operator(), STEPS))


def test_a_run_that_is_over_takes_no_products(directory):
    first = run(operator(), STEPS, checkpoint=directory)
    again = operator()
    assert_same_bits(run(again, STEPS, checkpoint=directory), first)
    assert again.products == 0


@pytest.mark.parametrize("steps", [5, 40])
def test_a_checkpoint_serves_runs_of_other_lengths(steps, directory):
    run(operator(), STEPS, checkpoint=directory)
    other = operator()
    result = run(other, steps, checkpoint=directory)
    assert other.products == max(0, steps - STEPS)
    assert_same_bits(result, run(operator(), steps))
    assert len(read_sealed(directory / STATE)["alphas"]) == max(steps, STEPS)


def test_an_invariant_space_ends_a_resumed_run_too(directory):
    elements = (torch.arange(SIZE) % 5).double()
    first = run(Diagonal(elements), 20, checkpoint=directory)
    assert first.steps == 5
    assert_same_bits(run(Diagonal(elements), 20, checkpoint=directory), first)


def test_the_basis_may_move_to_a_file(directory, tmp_path):
    run(operator(), 10, checkpoint=directory)
    file = tmp_path / "basis"
    result = run(operator(), STEPS, checkpoint=directory, basis_file=file)
    assert_same_bits(result, run(operator(), STEPS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"start='seed 0', .* has .*start='seed 1'\. Pass another"),
        ({"start": normals(SIZE)}, r"start='seed 0', .* has .*start='[0-9a-f]{32}'"),
        ({"identity": "b"}, r"identity='a', .* has .*identity='b', .*Pass another"),
    ],
)
def test_steps_of_another_run_are_refused(arguments, message, directory):
    run(operator(), 5, checkpoint=directory, identity="a")
    other = operator()
    with pytest.raises(ValueError, match=message):
        run(other, 5, checkpoint=directory, **{"identity": "a", **arguments})
    assert other.products == 0
    run(operator(), 5, checkpoint=directory, identity="a")


def test_steps_of_another_size_or_dtype_are_refused(directory):
    run(operator(), 5, checkpoint=directory)
    with pytest.raises(ValueError, match=r"size=120, .* has .*size=50"):
        run(Matrix(goe(50)), 5, checkpoint=directory)
    with pytest.raises(ValueError, match=r"float64', .* has .*torch\.float32'"):
        run(Matrix(goe(SIZE).float()), 5, checkpoint=directory)


def test_a_format_of_the_future_is_refused(directory):
    run(operator(), 5, checkpoint=directory)
    content = read_sealed(directory / STATE)
    write_sealed(directory / STATE, {**content, "format_version": 2})
    with pytest.raises(ValueError, match=r"version=2.*has .*version=1"):
        run(operator(), 5, checkpoint=directory)


def test_rows_that_no_state_counts_are_dropped(directory):
    run(operator(), 10, checkpoint=directory)
    with (directory / ROWS).open("ab") as file:
        file.write(b"half of a row")
    result = run(operator(), STEPS, checkpoint=directory)
    assert_same_bits(result, run(operator(), STEPS))
    assert_same_bits(run(operator(), STEPS, checkpoint=directory), result)


def test_rows_without_a_state_are_dropped(directory):
    directory.mkdir(parents=True)
    (directory / ROWS).write_bytes(b"of a run that was killed in its first saving")
    run(operator(), 10, checkpoint=directory)
    assert (directory / ROWS).stat().st_size == 11 * SIZE * 8
    result = run(operator(), STEPS, checkpoint=directory)
    assert_same_bits(result, run(operator(), STEPS))


def test_rows_are_synced_before_the_state_counts_them(directory, monkeypatch):
    calls = []

    def sync(file):
        calls.append(os.fstat(file).st_size)
        return os.fsync(file)

    def write(path, content):
        calls.append(len(content["alphas"]))
        write_sealed(path, content)

    noting = type("Os", (), {"fsync": staticmethod(sync)})
    monkeypatch.setattr(lanczos_checkpoint, "os", noting)
    monkeypatch.setattr(lanczos_checkpoint, "write_sealed", write)
    run(operator(), 6, checkpoint=directory, checkpoint_every=3)
    row = SIZE * 8
    assert calls == [4 * row, 3, 7 * row, 6]


def test_a_saving_that_failed_is_made_up_for_by_the_next(directory, monkeypatch):
    attempts = []

    def fail_once(path, content):
        attempts.append(path)
        if len(attempts) == 2:
            raise OSError("the disk was full for a moment")
        write_sealed(path, content)

    monkeypatch.setattr(lanczos_checkpoint, "write_sealed", fail_once)
    with pytest.raises(OSError, match="full"):
        run(operator(), STEPS, checkpoint=directory, checkpoint_every=3)
    assert len(read_sealed(directory / STATE)["alphas"]) == 6
    result = run(operator(), STEPS, checkpoint=directory)
    assert_same_bits(result, run(operator(), STEPS))


def test_a_damaged_checkpoint_is_refused(directory):
    run(operator(), 10, checkpoint=directory)
    rows, state = directory / ROWS, directory / STATE
    data, text = rows.read_bytes(), state.read_bytes()
    fix = rf"restore it, or remove {directory} to start again\."

    rows.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"10560 bytes, got 10559: {fix}"):
        run(operator(), STEPS, checkpoint=directory)
    rows.unlink()
    with pytest.raises(ValueError, match=f"10560 bytes, got 0: {fix}"):
        run(operator(), STEPS, checkpoint=directory)
    rows.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(ValueError, match=f"must have the digest .*, got .*: {fix}"):
        run(operator(), STEPS, checkpoint=directory)
    rows.write_bytes(data)
    for damaged in (text[:-20], text.replace(b"alphas", b"alphbs"), b""):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"the file was changed or cut; {fix}"):
            run(operator(), STEPS, checkpoint=directory)


def test_the_state_is_what_its_class_says(directory):
    result = run(operator(), 3, checkpoint=directory, identity="goe")
    content = json.loads((directory / STATE).read_text())
    assert content["alphas"] == result.alphas.tolist()
    assert content["betas"] == result.betas.tolist()
    del content["xxh3_128"], content["rows_xxh3_128"]
    del content["alphas"], content["betas"]
    assert content == {
        "format_version": 1,
        "size": SIZE,
        "dtype": "torch.float64",
        "identity": "goe",
        "start": "seed 0",
    }


@pytest.mark.full
def test_kill_9_loses_only_the_steps_since_the_last_saving(directory):
    command = "import sys; from tests.helpers.lanczos_runs import run_and_die; "
    command += "run_and_die(sys.argv[1], 12)"
    died = subprocess.run(
        [sys.executable, "-c", command, str(directory)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    resumed = operator()
    result = run(resumed, STEPS, checkpoint=directory)
    assert resumed.products == STEPS - 9
    assert_same_bits(result, run(operator(), STEPS))
