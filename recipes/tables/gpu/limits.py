"""Sections of a run that must not take longer than they may."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class TimeIsUpError(RuntimeError):
    """A section took longer than it may."""


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Args:
        seconds: the most that it may take.
        action: measures, and returns what is saved.
    """

    seconds: float
    action: Callable[[], Any]

    def run(self, left: float) -> dict[str, Any]:
        """Run it within what is left of the whole, and say how it ended.

        A section that fails does not keep the next ones from being measured.
        """
        start = time.perf_counter()
        most = min(self.seconds, left)
        ended: dict[str, Any]
        try:
            with limited(most):
                ended = {"results": self.action()}
        except TimeIsUpError:
            ended = {"stopped": f"after {most:.0f} s"}
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            ended = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        return {"seconds": time.perf_counter() - start, **ended}


@contextmanager
def limited(seconds: float) -> Generator[None]:
    """Raise TimeIsUpError within, once the time is over.

    Work that the device was given before goes on.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
