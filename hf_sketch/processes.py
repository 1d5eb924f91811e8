"""What several processes exchange: numbers, settings and failures."""

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, distributed

Value = TypeVar("Value")
_COMPARED = (int, float, str, frozenset, type(None))


def processes() -> PartialState:
    """Return Accelerate's processes; without an accelerator they are on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def check_same(user: str, settings: Mapping[str, Any]) -> None:
    """Raise in all processes if their settings differ; all of them must call together.

    Args:
        user: name of the callback that has the settings.
        settings: values by name; those that are no number, text or set are ignored.

    Raises:
        ValueError: a setting differs, and processes would wait for each other forever.
    """
    if PartialState().num_processes == 1:
        return
    own = {name: x for name, x in settings.items() if isinstance(x, _COMPARED)}
    everyone = of_each(own)
    for name in own:
        values = [other.get(name) for other in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"Processes disagree on {name} of {user} "
                f"({', '.join(map(repr, values))}). Pass the same value on every rank."
            )


def reduced(x: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """Return the sum or mean of x over processes; all of them must call together."""
    if PartialState().num_processes == 1:
        return x
    result = reduce(x, how)
    assert isinstance(result, Tensor)
    return result


def gathered(value: int) -> list[int]:
    """Return each process's number, by rank; all of them must call together."""
    values = gather(torch.tensor([value], device=PartialState().device))
    assert isinstance(values, Tensor)
    return values.tolist()


def of_process(rank: int, value: Value) -> Value:
    """Return the value of a process, picklable; all of them must call together."""
    values = [value]
    broadcast_object_list(values, from_process=rank)
    return values[0]


def of_first(value: Value) -> Value:
    """Return the first process's value; all of them must call together."""
    return of_process(0, value)


def of_each(value: Value) -> list[Value]:
    """Return each process's value, by rank; all of them must call together."""
    return gather_object([value])


def end_group() -> None:
    """End this process's group, if it has one, and the threads that work for it.

    A wrapped model holds the group, and a Trainer that nothing names any more still
    holds its model until garbage is collected: the threads would outlive the
    interpreter, which aborts when they ask for it
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if distributed.is_available() and distributed.is_initialized():
        group = distributed.group.WORLD
        distributed.destroy_process_group()
        gc.collect()
        # Whoever lets go of the group last waits for those threads, which may wait for
        # the interpreter: DDP does not let go of that meanwhile, but Python does.
        del group


class OtherProcessFailedError(RuntimeError):
    """Work that all processes share has failed in another one.

    Args:
        since: the first step whose work is missing there, as passed to `check_others`.
    """

    def __init__(self, since: int) -> None:
        super().__init__("it failed in another process, see the error there")
        self.since = since


def check_others(since: int = 0) -> None:
    """Wait for all processes, and stop all of them if one has failed.

    Every process calls this at the same places of its work. One that failed in between
    and went on to such a place says so here, or answers by leaving `Together`.

    Args:
        since: the first step whose work is missing in this process, from 1; 0 for none.

    Raises:
        OtherProcessFailedError: some process has failed.
    """
    failed = [step for step in gathered(since) if step]
    if failed:
        raise OtherProcessFailedError(min(failed))


class Together(AbstractContextManager[None]):
    """Work that all processes do at once, and that fails in all where it does in one.

    All enter it together, and call `check_others` before each exchange inside. One that
    fails answers the check that the others reach next, at the latest the one on
    leaving, so that none waits for an exchange that never comes.

    Raises:
        OtherProcessFailedError: on leaving, another process has failed.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            check_others()
        elif not isinstance(error, OtherProcessFailedError):
            gathered(1)
