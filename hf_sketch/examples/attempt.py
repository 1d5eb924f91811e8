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
    except (MemoryError, torch.OutOfMemoryError, RefusalError):
        raise
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
