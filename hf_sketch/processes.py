"""What several processes exchange: numbers, settings and failures."""

import gc
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, distributed

Value = TypeVar("Value")
_COMPARED = (int, float, str, frozenset, type(None))


def processes() -> PartialState:
    """Those that Accelerate knows of; without an accelerator they are on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def check_same(callback: str, settings: Mapping[str, Any]) -> None:
    """Raise in all processes if one has other settings; all of them must call together.

    Args:
        callback: whose settings they are.
        settings: by name; what is no number, text or set of them is passed over.

    Raises:
        ValueError: some differ: processes would wait for each other in vain.
    """
    if PartialState().num_processes == 1:
        return
    own = {name: x for name, x in settings.items() if isinstance(x, _COMPARED)}
    everyone: list[dict[str, Any]] = gather_object([own])
    for name in own:
        values = [other.get(name) for other in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{callback} needs the same settings in all processes, got {name}="
                f"{', '.join(map(repr, values))}: pass the same to each."
            )


@contextmanager
def in_turn() -> Generator[PartialState]:
    """Run in the first process of all, the first of each machine, then in the others.

    So files are made by one process, also on machines without a common file system.
    """
    processes = PartialState()
    with processes.main_process_first(), processes.local_main_process_first():
        yield processes


def reduced(x: Tensor, how: str) -> Tensor:
    """The "sum" or "mean" of x over the processes; all of them must call together."""
    if PartialState().num_processes == 1:
        return x
    result = reduce(x, how)
    assert isinstance(result, Tensor)
    return result


def gathered(value: int) -> list[int]:
    """The number that each process has; all of them must call together."""
    values = gather(torch.tensor([value], device=PartialState().device))
    assert isinstance(values, Tensor)
    return values.tolist()


def of_first(value: Value) -> Value:
    """What the first process has; all of them must call together."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def end_group() -> None:
    """End this process's group, if it has one, and the threads that work for it.

    A wrapped model holds the group, and a Trainer that nothing names any more still
    holds its model until garbage is collected: the threads would outlive the
    interpreter, which aborts when they ask for it
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


class OtherProcessFailedError(RuntimeError):
    """What processes do together failed in another of them."""


class Together(AbstractContextManager[None]):
    """Work that all processes do at once, and that fails in all where it does in one.

    All enter it together, and call `check_others` before each exchange inside. One that
    fails, at whatever place, answers the check that the others come to next, at the
    latest that on leaving; so none waits for an exchange that never comes.

    Raises:
        OtherProcessFailedError: on leaving, another process failed.
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


def check_others() -> None:
    """Wait until all processes are here.

    Raises:
        OtherProcessFailedError: another process failed in what they do together.
    """
    if any(gathered(0)):
        raise OtherProcessFailedError("it failed in another process, which tells why")
