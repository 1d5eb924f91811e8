import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker has one core

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when first imported, as by transformers: kernels run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Tests of one file go to one worker, which makes what they share once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """Keep what is imported out of each Trainer's garbage collection: a third of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let extension modules find their objects freed when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture
def no_generator_use():
    """Fails the test if torch's global generator was drawn from."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
