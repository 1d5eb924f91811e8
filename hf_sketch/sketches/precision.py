"""Sketches keep their own precision where autocast would lower it."""

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

_KINDS = ("cpu", "cuda", "xpu", "mps", "xla")  # of devices

Given = ParamSpec("Given")
Result = TypeVar("Result")


@contextmanager
def without_autocast() -> Generator[None]:
    """Compute within in the precision that numbers have."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _KINDS):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exact(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a function compute without autocast."""

    @functools.wraps(function)
    def computed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not any(map(torch.is_autocast_enabled, _KINDS)):
            return function(*args, **kwargs)
        with without_autocast():
            return function(*args, **kwargs)

    return computed
