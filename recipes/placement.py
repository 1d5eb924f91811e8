"""The device that a table's script runs on: the one that Accelerate gives.

`ACCELERATE_USE_CPU=true` in the environment keeps it on the CPU.
"""

import platform

import torch
from accelerate import PartialState


def device() -> torch.device:
    """An accelerator where there is one, or else the CPU."""
    return PartialState().device


def device_name() -> str:
    """What the maker calls the device."""
    place = device()
    module = torch.get_device_module(place)
    name = getattr(module, "get_device_name", None)
    return platform.machine() if name is None else name(place)


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if device().type != "cpu":
        torch.accelerator.synchronize()
