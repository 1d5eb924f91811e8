"""A search in several processes takes the path that it takes in one.

Training runs in processes of their own, by tests/helpers/joint_training.py.
"""

import pytest
import torch

from hf_sketch import load_dimension_search
from hf_sketch.callbacks import IntrinsicDimensionCallback
from tests.helpers.joint_training import HEAD, HEADED, MODULE, SEARCH, search_settings
from tests.helpers.launching import TORCHRUN, launch, run_together, told
from tests.helpers.training import tiny_trainer

IN_TWO = ("search", "search_with_a_head", "search_resumed", "search_unwritable")
IN_TWO += ("search_refused",)
HEAD_NUMBERS = 3 * 32 + 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave."""
    return launch(TORCHRUN, 2, tmp_path_factory.mktemp("two"), IN_TWO, MODULE)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes leave."""
    directory = tmp_path_factory.mktemp("four")
    return launch(TORCHRUN, 4, directory, ("search",), MODULE)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same search in one process: its path and its weights."""
    return one_process(tmp_path_factory.mktemp("single"))


def one_process(directory, config=None, **options):
    callback = IntrinsicDimensionCallback(**{**SEARCH, **options})
    trainer = tiny_trainer(directory, callback, **search_settings(**(config or {})))
    trainer.train()
    return load_dimension_search(directory).path, trainer.model.state_dict()


def assert_path_of_one_process(directory, single, processes=2):
    """The same stages; the sums of float64 are taken in another order."""
    path, weights = single
    found = load_dimension_search(directory).path
    assert [(stage.step, stage.dim, stage.decision) for stage in found] == [
        (stage.step, stage.dim, stage.decision) for stage in path
    ]
    metrics = [stage.metric for stage in path]
    assert [stage.metric for stage in found] == pytest.approx(metrics, rel=1e-9)
    for rank in range(processes):
        trained = torch.load(directory / f"weights-{rank}.pt")
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-9)


def dims_of(path, steps):
    """The dimension that each step trains."""
    doubled = [stage.step for stage in path if stage.decision == "double"]
    first = path[0].dim
    return [
        first * 2 ** sum(at < step for at in doubled) for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(("left", "processes"), [("two", 2), ("four", 4)])
def test_the_path_and_omega_are_those_of_one_process(left, processes, single, request):
    decisions = [stage.decision for stage in single[0]]
    assert {"start", "continue", "double"} == set(decisions)
    directory = request.getfixturevalue(left) / "search"
    assert_path_of_one_process(directory, single, processes)


def test_processes_exchange_the_present_dimension_and_nothing_else(two, single):
    for exchanged in told(two / "search", "exchanged"):
        assert exchanged == dims_of(single[0], steps=30)


def test_a_head_that_trains_in_full_is_averaged_beside_it(two, tmp_path):
    single = one_process(tmp_path, HEAD, **HEADED)
    directory = two / "search_with_a_head"
    assert_path_of_one_process(directory, single)
    assert single[0][0].dim == 8
    assert "double" in [stage.decision for stage in single[0]]
    dims = dims_of(single[0], steps=single[0][-1].step)  # it ends early
    for exchanged in told(directory, "exchanged"):
        assert exchanged == [dim + HEAD_NUMBERS for dim in dims]


def test_a_resumed_search_is_that_of_an_uninterrupted_run(two, single):
    assert_path_of_one_process(two / "search_resumed", single)


def test_models_that_ddp_does_not_follow_are_refused(two):
    for compiled in told(two / "search_refused", "compiled"):
        assert (
            "IntrinsicDimensionCallback needs the whole model, uncompiled" in compiled
        )
        assert "got torch_compile=True: train without" in compiled
    for bare in told(two / "search_refused", "bare"):
        assert "in 2 processes needs the model in DistributedDataParallel" in bare


def test_what_the_first_process_cannot_write_stops_all(two):
    first, second = told(two / "search_unwritable", "error")
    assert "IsADirectoryError" in first
    assert "it failed in another process, which tells why" in second


def test_a_process_that_dies_takes_the_others_down_within_a_minute(tmp_path):
    run = run_together(TORCHRUN, 2, tmp_path, ["search_broken"], MODULE)
    code, errors, seconds = run
    assert code != 0
    assert "ArithmeticError: an odd end" in errors
    assert seconds < 60
