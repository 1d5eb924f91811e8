"""What an action raised, whatever that is."""

import traceback
from pathlib import Path
from types import TracebackType

import hf_sketch
import hf_sketch.callbacks
import hf_sketch.recipes

_RECIPES = Path(hf_sketch.recipes.__file__).parent
_ROOMS = [Path(room.__file__).parent for room in (hf_sketch, hf_sketch.callbacks)]


class Attempt:
    """A block of code that may fail; `error` is what it raised, if it did.

    The census runs code of hundreds of classes to find out which errors come: none can
    be named beforehand.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is not None

    @property
    def is_ours(self) -> bool:
        """Whether the package itself raised the error."""
        return _is_ours(self._frames[-1])

    @property
    def reason(self) -> str:
        """The error in a line."""
        words = " ".join(str(self.error).split())[:400]
        return f"{type(self.error).__name__}: {words}"

    @property
    def trace(self) -> str:
        """The package's innermost frames of the error, then the innermost of all."""
        frames = self._frames
        ours = [frame for frame in frames if _is_ours(frame)][-2:]
        shown = [*ours, *(frame for frame in frames[-3:] if frame not in ours)]
        return "\n".join(f"{f.filename}:{f.lineno} {f.line}" for f in shown)

    @property
    def _frames(self) -> list[traceback.FrameSummary]:
        assert self.error is not None
        return list(traceback.extract_tb(self.error.__traceback__))


def _is_ours(frame: traceback.FrameSummary) -> bool:
    """Return whether a frame is of the package, and not of its recipes."""
    path = Path(frame.filename)
    if path.is_relative_to(_RECIPES):
        return False
    return any(path.is_relative_to(room) for room in _ROOMS)
