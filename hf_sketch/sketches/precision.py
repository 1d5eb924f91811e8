"""Sketches keep their own precision where autocast would lower it."""

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


@contextmanager
def without_autocast() -> Generator[None]:
    """Compute within in the precision that numbers have."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _kinds()):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exact(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a function compute without autocast."""

    @functools.wraps(function)
    def computed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not any(map(torch.is_autocast_enabled, _kinds())):
            return function(*args, **kwargs)
        with without_autocast():
            return function(*args, **kwargs)

    return computed


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Return the kinds of devices on which autocast may be on."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
