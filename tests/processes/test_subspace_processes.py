"""A subspace adapter in several processes moves as in one.

Training runs in processes of their own, by distributed_training.py.
"""

import pytest
import torch

from tests.helpers.processes.distributed_training import subspace_settings
from tests.helpers.processes.launching import results
from tests.helpers.trained.training import tiny_trainer

OMEGA = "base_model.coordinates.subspace_omega.default.weight"

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.in_processes(2, "ddp/subspace")
def test_omega_is_that_of_one_process_with_the_same_batches(launched, tmp_path):
    settings = subspace_settings()
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    expected = trainer.model.base_model.omega.detach()
    first, second = (
        torch.load(launched / "subspace" / f"weights-{rank}.pt") for rank in (0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(first[OMEGA], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.in_processes(2, "ddp/subspace")
def test_processes_exchange_omega_alone(launched):
    assert results(launched / "subspace", "exchanged") == [[[32]] * 6] * 2
