"""Rows on the device that trains, until they are wanted in the store."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

_MOST_BYTES = 2**25
_MOST_PARTS = 256  # each one more argument of the program that joins them

Columns = Mapping[str, Tensor]


class HeldRows:
    """Holds rows of an accelerator, which then need not wait for them step by step.

    Rows that are on the CPU already are handed on as they come; the others in one
    transfer, when there are many or they are to be written.

    Args:
        hand_on: takes a kind of rows and its columns, on the CPU.
    """

    def __init__(self, hand_on: Callable[[str, Columns], None]) -> None:
        self._hand_on = hand_on
        self._held: list[tuple[str, Columns]] = []
        self._bytes = 0

    def append(self, kind: str, columns: Columns) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        away = _away(columns)
        if not away:
            self._hand_on(kind, columns)
            return
        self._held.append((kind, columns))
        self._bytes += sum(column.nbytes for column in away)

    def end_step(self) -> None:
        """Hand the rows on if there are many."""
        if self._bytes >= _MOST_BYTES or len(self._held) >= _MOST_PARTS:
            self.flush()

    def flush(self) -> None:
        """Hand all rows on."""
        held, self._held, self._bytes = self._held, [], 0
        moved = iter(_moved([x for _, columns in held for x in _away(columns)]))
        for kind, columns in held:
            here = {
                name: column if column.is_cpu else next(moved)
                for name, column in columns.items()
            }
            self._hand_on(kind, here)


def _away(columns: Columns) -> list[Tensor]:
    """The columns that are not on the CPU."""
    return [column for column in columns.values() if not column.is_cpu]


def _moved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers on the CPU, moved as one tensor."""
    if not tensors:
        return []
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    flat = torch.cat([x.detach().reshape(-1).to(dtype) for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [p.view(x.shape).to(x.dtype) for p, x in zip(parts, tensors, strict=True)]
