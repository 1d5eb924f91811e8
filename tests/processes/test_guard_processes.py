"""Processes judge a step together, though one of them alone has the bad examples."""

import pytest
import torch

from tests.helpers.processes.guarded_training import LAST
from tests.helpers.processes.launching import assert_bit_equal_training, results
from tests.helpers.trained.guarded_training import (
    BAD_STEP,
    STEPS,
    alarms_of,
    lines_of,
)

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.in_processes(2, "guarded/plain", "guarded/quiet")
def test_two_processes_train_as_without_a_guard_while_nothing_stands_out(launched):
    assert_bit_equal_training(launched, "quiet")
    assert len(lines_of(launched / "quiet")) == STEPS  # one line per step, by the first


@pytest.mark.in_processes(2, "guarded/skips")
def test_all_processes_skip_a_step_that_is_bad_in_one(launched):
    assert results(launched / "skips", "stays") == [[BAD_STEP], [BAD_STEP]]
    first, second = (
        torch.load(launched / "skips" / f"weights-{rank}.pt") for rank in (0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    (line,) = alarms_of(launched / "skips")
    named = {one["example_id"] for one in line["examples"] if "loss" in one["reasons"]}
    assert named == {*LAST}
