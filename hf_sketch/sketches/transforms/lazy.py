"""Devices on which work is gathered into programs before it runs."""

from torch import Tensor


def reads_freely(x: Tensor) -> bool:
    """Whether Python reads x's numbers without waiting for a device."""
    return x.is_cpu


def is_lazy(x: Tensor) -> bool:
    """Whether x's device compiles what is done with it, as torch_xla does for TPUs.

    There a number that Python reads stops the gathering, and a shape that depends on
    numbers means a new program each time; work that may be needless is cheaper.
    """
    return x.device.type == "xla"
