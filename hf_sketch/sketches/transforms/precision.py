"""Sketches keep their own precision where autocast would lower it."""

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
)
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def without_autocast() -> AbstractContextManager[None]:
    """Return a context that computes in the precision that numbers have."""
    kinds = [kind for kind in _kinds() if torch.is_autocast_enabled(kind)]
    return _off(kinds) if kinds else nullcontext()


@contextmanager
def _off(kinds: Sequence[str]) -> Generator[None]:
    """Turn autocast off within."""
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exact(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a function compute without autocast."""

    @functools.wraps(function)
    def computed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with without_autocast():
            return function(*args, **kwargs)

    return computed


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Return the kinds of devices on which autocast may be on."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
