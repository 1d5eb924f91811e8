"""The table of where the tensors of a gradient are, for the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MIXED: Final = len(DTYPES)
_VECTOR_BYTES: Final = 16  # that one instruction may read

# The address of element 0, the first element, one past the last, the dtype's place.
Row = tuple[int, int, int, int]


@dataclass(frozen=True)
class Given:
    """The tensors of one call.

    Args:
        table: (tensors and packed vectors, 4).
        kind: place of the dtype that all tensors have, or 3 if they differ.
        aligned: whether all tensors begin at multiples of 16 bytes.
        packed: where small tensors are copied to, end to end.
        tensors: what the addresses are of, so that it lives until kernels are launched.
    """

    table: Tensor
    kind: int
    aligned: bool
    packed: Tensor
    tensors: Sequence[Tensor | None]


class AddressTable:
    """Keeps the table on the device, where gradients often stay where they were.

    Args:
        packed_sizes: elements of each packed vector.
        device: where the tensors are.
        wide: whether packed vectors are in float32 beside any tensors.
        firsts: places of the first element that each tensor, a shard, has; zeros by
            default.
    """

    def __init__(
        self,
        packed_sizes: Sequence[int],
        device: torch.device,
        wide: bool = False,
        firsts: Sequence[int] = (),
    ) -> None:
        self._packed_sizes, self._device, self._wide = packed_sizes, device, wide
        self._firsts = firsts
        self._packed: dict[torch.dtype, Tensor] = {}
        self._rows: list[Row] = []
        self._table = torch.empty(0)

    def give(self, tensors: Sequence[Tensor | None]) -> Given:
        """Return the table of these tensors; None has no elements.

        Tensors that are not contiguous are copied.
        """
        held = [None if x is None else x.detach().contiguous() for x in tensors]
        kinds = {DTYPES.index(x.dtype) for x in held if x is not None}
        kind = kinds.pop() if len(kinds) == 1 else _MIXED
        wide = self._wide or kind == _MIXED
        packed = self._packed_at(torch.float32 if wide else DTYPES[kind])
        aligned = all(x.data_ptr() % _VECTOR_BYTES == 0 for x in held if x is not None)
        firsts = self._firsts or [0] * len(held)
        rows = [_row(x, first) for x, first in zip(held, firsts, strict=True)]
        rows += map(_row, packed.split(self._packed_sizes))
        if rows != self._rows:
            # From pinned memory, so that the device is not waited for.
            pinned = self._device.type != "cpu"
            table = torch.tensor(rows, dtype=torch.int64, pin_memory=pinned)
            self._table = table.to(self._device, non_blocking=True)
            self._rows = rows
        return Given(self._table, kind, aligned, packed, held)

    def _packed_at(self, dtype: torch.dtype) -> Tensor:
        """Return the packed vectors' memory, zero where nothing is copied to."""
        if dtype not in self._packed:
            length = sum(self._packed_sizes)
            self._packed[dtype] = torch.zeros(length, dtype=dtype, device=self._device)
        return self._packed[dtype]


def _row(x: Tensor | None, first: int = 0) -> Row:
    if x is None:
        return 0, 0, 0, 0
    address = x.data_ptr() - first * x.element_size()
    return address, first, first + x.numel(), DTYPES.index(x.dtype)
