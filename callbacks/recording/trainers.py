"""The Trainer that calls a callback, which none of its events names."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, TrainerState

Kind = TypeVar("Kind", bound=TrainerCallback)


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


def only_callback(trainer: Trainer, kind: type[Kind]) -> Kind:
    """Return a Trainer's callback of a kind.

    Raises:
        ValueError: there is none, or several.
    """
    callbacks = trainer.callback_handler.callbacks
    own = [callback for callback in callbacks if isinstance(callback, kind)]
    name = kind.__name__
    if not own:
        raise ValueError(
            f"This Trainer has no {name}. Add one: trainer.add_callback({name}())."
        )
    if len(own) > 1:
        raise ValueError(
            f"This Trainer has {len(own)} {name}s, which would write to one store. "
            "Keep one: it can record rows of steps and of examples."
        )
    return own[0]


def free_trainer(kind: type[TrainerCallback], busy: TrainerState | None) -> Trainer:
    """Return the Trainer that calls its only callback of a kind.

    Args:
        kind: class of the callback.
        busy: state of the training that the callback has recorded so far, if any.

    Raises:
        RuntimeError: no Trainer calls.
        ValueError: it has several of them, or calls from within the training that the
            callback still records.
    """
    trainers = list(calling_trainers())
    name = kind.__name__
    if not trainers:
        raise RuntimeError(
            f"{name} was called by no Trainer. Pass it to a Trainer of transformers: "
            "Trainer(..., callbacks=[callback])."
        )
    only_callback(trainers[0], kind)
    if busy is not None and any(busy is outer.state for outer in trainers[1:]):
        raise ValueError(
            f"This {name} still records the training around this one. Pass a {name} of "
            "its own to the inner Trainer."
        )
    return trainers[0]


def wrap_method(
    trainer: Trainer, name: str, wrapper: Callable[..., Any]
) -> Callable[[], None]:
    """Make a Trainer's method, `method(...)`, call `wrapper(method, ...)`.

    Args:
        trainer: the Trainer.
        name: name of the method.
        wrapper: a function, or a bound method.

    Returns:
        what undoes it.
    """
    _unwrap(trainer, name, wrapper)  # a copy whose training was interrupted
    # A partial of bound methods: in a copy of the Trainer they are the copy's own.
    setattr(trainer, name, partial(wrapper, getattr(trainer, name)))
    return partial(_unwrap, trainer, name, wrapper)


def _unwrap(trainer: Trainer, name: str, wrapper: Any) -> None:
    """Undo `wrap_method`, unless others have wrapped what that made."""
    wrapped = vars(trainer).get(name)
    if not isinstance(wrapped, partial):
        return
    function: Any = getattr(wrapped.func, "__func__", wrapped.func)
    if function is getattr(wrapper, "__func__", wrapper):
        delattr(trainer, name)
        if getattr(trainer, name) != wrapped.args[0]:  # it was replaced before, too
            setattr(trainer, name, wrapped.args[0])
