"""Rows on the device that trains, until they are wanted in the store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

_MOST_BYTES = 2**25
_MOST_PARTS = 256  # each one more argument of the program that joins them

Columns = Mapping[str, Tensor]


class HeldRows:
    """Holds rows of an accelerator, which then need not wait for them step by step.

    Rows that are on the CPU already are handed on as they come. The others leave in
    one transfer when there are many: training goes on meanwhile where the device can
    do both, and they are handed on when the next ones leave, or at a flush.

    Args:
        hand_on: takes a kind of rows and its columns, on the CPU.
    """

    def __init__(self, hand_on: Callable[[str, Columns], None]) -> None:
        self._hand_on = hand_on
        self._held: list[tuple[str, Columns]] = []
        self._bytes = 0
        self._transfer: _Transfer | None = None

    def append(self, kind: str, columns: Columns) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        away = _away(columns)
        if not away:
            self._hand_on(kind, columns)
            return
        self._held.append((kind, columns))
        self._bytes += sum(column.nbytes for column in away)

    def end_step(self) -> None:
        """Send the rows off if there are many."""
        if self._bytes >= _MOST_BYTES or len(self._held) >= _MOST_PARTS:
            self._send()

    def flush(self) -> None:
        """Hand all rows on."""
        if self._held:
            self._send()
        self._receive()

    def _send(self) -> None:
        held, self._held, self._bytes = self._held, [], 0
        transfer = _Transfer.of(held)
        self._receive()  # those before, which are there by now
        self._transfer = transfer

    def _receive(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            for kind, columns in transfer.rows():
                self._hand_on(kind, columns)


@dataclass(frozen=True)
class _Transfer:
    """Rows on their way to the CPU.

    Args:
        held: the rows; of columns that are away only shapes and types are asked.
        flat: their columns that are away, end to end, on the CPU.
        done: when `flat` is there; None if it is.
    """

    held: Sequence[tuple[str, Columns]]
    flat: Tensor
    done: torch.cuda.Event | None = None

    @classmethod
    def of(cls, held: Sequence[tuple[str, Columns]]) -> "_Transfer":
        """Start to move rows, as one tensor."""
        away = [column for _, columns in held for column in _away(columns)]
        dtype = reduce(torch.promote_types, (x.dtype for x in away))
        joined = torch.cat([x.detach().reshape(-1).to(dtype) for x in away])
        if not joined.is_cuda:
            return cls(held, joined.cpu())
        flat = joined.to("cpu", non_blocking=True)  # into pinned memory
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(joined.device))
        return cls(held, flat, done)

    def rows(self) -> list[tuple[str, Columns]]:
        """The rows, all on the CPU; waits until they are there."""
        if self.done is not None:
            self.done.synchronize()
        start = 0
        rows: list[tuple[str, Columns]] = []
        for kind, columns in self.held:
            here: dict[str, Tensor] = {}
            for name, column in columns.items():
                here[name] = column
                if not column.is_cpu:
                    part = self.flat[start : start + column.numel()]
                    here[name] = part.view(column.shape).to(column.dtype)
                    start += column.numel()
            rows.append((kind, here))
        return rows


def _away(columns: Columns) -> list[Tensor]:
    """The columns that are not on the CPU."""
    return [column for column in columns.values() if not column.is_cpu]
