"""What is leaned on in accelerate beneath its public names, as read in 1.15."""

from accelerate import Accelerator
from torch import nn


def test_mixed_precision_keeps_the_forward_pass_that_it_wraps():
    layer = nn.Linear(2, 2)
    forward = layer.forward
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(layer)
    assert vars(prepared)["_original_forward"] == forward
    assert prepared.forward != forward
