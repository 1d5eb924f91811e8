"""Devices on which the kernels for many tensors run."""

import importlib
import importlib.util

import torch


def can_launch(device: torch.device) -> bool:
    """Return whether a device runs these kernels."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    if device.type == "cpu" or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False  # no products in bfloat16
    return hasattr(importlib.import_module("triton.language"), "tuple")
