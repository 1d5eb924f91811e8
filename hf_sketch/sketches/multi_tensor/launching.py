"""Finding and launching the Triton kernels."""

import importlib
from typing import Any, Final

import torch
from torch import Tensor

_MODULES: Final = {
    "gather": "rows",
    "add_rows": "rows",
    "finish_row": "rows",
    "sum_blocks": "blocks",
    "sum_long_blocks": "long_blocks",
    "sum_matrices": "matrices",
    "spread": "lifted",
    "lift_blocks": "lifted",
    "lift_long_blocks": "lifted_long_blocks",
    "lift_matrices": "lifted",
}


def kernel_of(name: str) -> Any:
    """Return a kernel. Its module is imported here, because it needs Triton."""
    module = f"{__package__}.kernels.{_MODULES[name]}"
    return getattr(importlib.import_module(module), name)


def launch(
    near: Tensor, name: str, grid: tuple[int, ...], *args: Any, **kwargs: Any
) -> None:
    """Launch a kernel on the device of a tensor."""
    with torch.cuda.device_of(near):
        kernel_of(name)[grid](*args, **kwargs, enable_fp_fusion=True)
