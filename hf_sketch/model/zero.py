"""Parameters that DeepSpeed's ZeRO-3 splits: empty but while their module runs."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from torch import Tensor


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, also where other processes hold most of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def in_partitions(parameters: Iterable[Any]) -> bool:
    """Return whether ZeRO-3 has split some parameters among the processes."""
    return any(hasattr(parameter, "ds_shape") for parameter in parameters)


def gathered(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return a context in which parameters are whole; all processes must enter it."""
    split = [p for p in parameters if hasattr(p, "ds_status")]
    split = [p for p in split if p.ds_status.name != "AVAILABLE"]
    if not split:
        return nullcontext()
    return import_module("deepspeed").zero.GatheredParameters(split)
