"""The Trainer that calls a callback, which none of its events names."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import Trainer


def calling_trainers() -> Iterator[Trainer]:
    """Yield the Trainers on the stack of this call, innermost first.

    Only the innermost one's method and outer calls of the same method are looked into:
    reading a frame's variables keeps them alive until the frame ends (before Python
    3.13), and the user's frames may hold models.
    """
    frame, method = inspect.currentframe(), None
    while frame is not None:
        if method in (None, frame.f_code):
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer):
                method = frame.f_code
                yield caller
        frame = frame.f_back


def wrap_training_step(
    trainer: Trainer, wrapper: Callable[..., Any]
) -> Callable[[], None]:
    """Make `trainer.training_step(...)` call `wrapper(training_step, ...)`.

    Returns:
        what undoes it.
    """
    _unwrap(trainer, wrapper)  # a copy of a Trainer whose training was interrupted
    # A partial of bound methods: in a copy of the Trainer they are the copy's own.
    trainer.training_step = partial(wrapper, trainer.training_step)
    return partial(_unwrap, trainer, wrapper)


def _unwrap(trainer: Trainer, wrapper: Callable[..., Any]) -> None:
    """Undo `wrap_training_step`, unless others have wrapped what that made."""
    wrapped = vars(trainer).get("training_step")
    if isinstance(wrapped, partial) and wrapped.func == wrapper:
        delattr(trainer, "training_step")
        if trainer.training_step != wrapped.args[0]:  # it was replaced before, too
            trainer.training_step = wrapped.args[0]
