"""What tests of curvature share."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState


@pytest.fixture
def bf16_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
