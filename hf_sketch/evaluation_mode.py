"""Running a model without leaving a trace."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from hf_sketch.replayed_gradients import kept_random_state, random_state


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Eval mode; every module's own mode and the random numbers are restored."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with kept_random_state(random_state(device), device):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
