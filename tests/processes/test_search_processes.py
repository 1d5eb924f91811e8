"""A search in several processes takes the path that it takes in one."""

import pytest
import torch

from hf_sketch import load_dimension_search
from hf_sketch.callbacks import IntrinsicDimensionCallback
from tests.helpers.processes.joint_training import HEAD, HEADED, SEARCH, search_settings
from tests.helpers.processes.launching import in_two_and_four, results, run_together
from tests.helpers.trained.training import tiny_trainer

HEAD_NUMBERS = 3 * 32 + 3

pytestmark = pytest.mark.xdist_group("processes")


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


@in_two_and_four("joint/search")
def test_the_path_and_omega_are_those_of_one_process(launched, processes, single):
    decisions = [stage.decision for stage in single[0]]
    assert {"start", "continue", "double"} == set(decisions)
    assert_path_of_one_process(launched / "search", single, processes)


@pytest.mark.in_processes(2, "joint/search")
def test_processes_exchange_the_present_dimension_and_nothing_else(launched, single):
    for exchanged in results(launched / "search", "exchanged"):
        assert exchanged == dims_of(single[0], steps=30)


@pytest.mark.full
@pytest.mark.in_processes(2, "joint/search_with_a_head")
def test_a_head_that_trains_in_full_is_averaged_beside_it(launched, tmp_path):
    single = one_process(tmp_path, HEAD, **HEADED)
    directory = launched / "search_with_a_head"
    assert_path_of_one_process(directory, single)
    assert single[0][0].dim == 8
    assert "double" in [stage.decision for stage in single[0]]
    dims = dims_of(single[0], steps=single[0][-1].step)  # it ends early
    for exchanged in results(directory, "exchanged"):
        assert exchanged == [dim + HEAD_NUMBERS for dim in dims]


@pytest.mark.full
@pytest.mark.in_processes(2, "joint/search_resumed")
def test_a_resumed_search_is_that_of_an_uninterrupted_run(launched, single):
    assert_path_of_one_process(launched / "search_resumed", single)


@pytest.mark.full
@pytest.mark.in_processes(2, "joint/search_refused")
def test_models_that_ddp_does_not_follow_are_refused(launched):
    for compiled in results(launched / "search_refused", "compiled"):
        assert (
            "IntrinsicDimensionCallback does not support torch_compile=True" in compiled
        )
    for bare in results(launched / "search_refused", "bare"):
        assert "in 2 processes needs the model in DistributedDataParallel" in bare


@pytest.mark.full
@pytest.mark.in_processes(2, "joint/search_unwritable")
def test_what_the_first_process_cannot_write_stops_all(launched):
    first, second = results(launched / "search_unwritable", "error")
    assert "IsADirectoryError" in first
    assert "it failed in another process, see the error there" in second


@pytest.mark.full
def test_a_process_that_dies_takes_the_others_down_within_a_minute(tmp_path):
    code, errors, seconds = run_together(2, tmp_path, ["joint/search_broken"])
    assert code != 0
    assert "ArithmeticError: an odd end" in errors
    assert seconds < 60
