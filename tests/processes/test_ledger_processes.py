"""The ledger of training in several processes, and of parameters in shards."""

import pytest
import torch

from hf_sketch import load_updates, verify_training
from tests.helpers.trained.training import undropped_bert

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.in_processes(2, "ddp/ledger")
def test_the_ledger_of_two_processes_that_resume_balances(launched):
    run = launched / "ledger"
    assert load_updates(run)["step"][:] == [0, 1, 2, 3, 4, 4, 5, 6]
    check = verify_training(run, run / "checkpoint-2", run / "checkpoint-6")
    assert check.problems == ()
    assert check.residual < 1e-6


@pytest.mark.in_processes(2, "fsdp/ledger")
def test_the_ledger_of_parameters_in_shards_balances(launched):
    run = launched / "ledger"
    before = dict(undropped_bert().named_parameters())
    shards = [torch.load(run / f"weights-{rank}.pt") for rank in (0, 1)]
    after = {name: torch.cat([own[name] for own in shards]) for name in before}
    check = verify_training(run, before, after)
    assert (check.first_step, check.last_step) == (0, 6)
    assert check.problems == ()
    assert check.residual < 1e-6
