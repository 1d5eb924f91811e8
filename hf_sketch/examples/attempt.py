"""Trying what may fail in any way, since it runs code that others wrote."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class RefusalError(ValueError):
    """There are no per-example gradients; other ways would not help."""


@dataclass
class Attempt:
    """What came of an attempt.

    Args:
        error: how it failed, in words; None if it did not.
    """

    error: str | None = None


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


def is_held(error: BaseException | None) -> bool:
    """Return whether an attempt has failed, so that another way may work."""
    final = (*OUT_OF_MEMORY, RefusalError)
    return isinstance(error, Exception) and not isinstance(error, final)


@contextmanager
def attempt() -> Generator[Attempt]:
    """Note it if something fails within; what uses this takes another way then.

    Raises:
        MemoryError, torch.OutOfMemoryError: memory runs out, which says nothing.
        RefusalError: it is known that there is no other way.
    """
    outcome = Attempt()
    try:
        yield outcome
    # Models, datasets and collators are others' code, which may raise any class, also
    # one of its own. No list of types covers that, and callers have another way left.
    except Exception as error:
        if not is_held(error):
            raise
        outcome.error = f"{type(error).__name__}: {error}"
