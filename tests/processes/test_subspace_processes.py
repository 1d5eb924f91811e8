"""A subspace adapter in several processes moves as in one.

Training runs in processes of their own, by tests/helpers/distributed_training.py.
"""

import pytest
import torch

from tests.helpers.distributed_training import subspace_settings
from tests.helpers.launching import TORCHRUN, launch, told
from tests.helpers.training import tiny_trainer

OMEGA = "base_model.coordinates.subspace_omega.default"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave."""
    directory = tmp_path_factory.mktemp("two")
    return launch(TORCHRUN, 2, directory, ("subspace",))


@pytest.mark.slow
def test_omega_is_that_of_one_process_with_the_same_batches(two, tmp_path):
    settings = subspace_settings()
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    expected = trainer.model.base_model.omega.detach()
    first, second = (
        torch.load(two / "subspace" / f"weights-{rank}.pt") for rank in (0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(first[OMEGA], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_processes_exchange_omega_alone(two):
    assert told(two / "subspace", "exchanged") == [[[32]] * 6] * 2
