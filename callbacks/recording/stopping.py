"""Recording that stops where memory or disk run out, while training continues."""

import functools
import warnings
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

_NO_ROOM = (OSError, MemoryError, torch.OutOfMemoryError)  # of the disk, or the memory


class Stoppable(Protocol):
    """What records until it is stopped."""

    stopped: bool
    raises: bool

    def stop(self, reason: str) -> None:
        """Record nothing from now on."""
        ...


R = TypeVar("R", bound=Stoppable)
P = ParamSpec("P")


def unless_stopped(
    method: Callable[Concatenate[R, P], None],
) -> Callable[Concatenate[R, P], None]:
    """Skip a method once recording has stopped, and stop where there is no room."""

    @functools.wraps(method)
    def guarded(run: R, *args: P.args, **kwargs: P.kwargs) -> None:
        if not run.stopped:
            try:
                method(run, *args, **kwargs)
            except _NO_ROOM as error:
                run.stop(f"{type(error).__name__}: {error}")
                if run.raises:
                    raise

    return guarded


def warn_of_stop(reason: str) -> None:
    """Warn that recording stops, and training does not."""
    warnings.warn(
        f"Recording stopped: {reason}. Training continues (on_error='warn'). Resume "
        "from a checkpoint to record again.",
        stacklevel=3,
    )
