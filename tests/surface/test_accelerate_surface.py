"""What is leaned on in accelerate beneath its public names, as read in 1.15."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn


@pytest.fixture
def no_state():
    """Settings of tests before would be kept: Accelerate has one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_state")
def test_mixed_precision_keeps_the_forward_pass_that_it_wraps():
    layer = nn.Linear(2, 2)
    forward = layer.forward
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(layer)
    assert vars(prepared)["_original_forward"] == forward
    assert prepared.forward != forward
