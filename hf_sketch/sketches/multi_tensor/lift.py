"""A vector of sketch numbers, lifted to any number of tensors in three launches."""

import importlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_sketch.sketches.multi_tensor.division import (
    GradientTensors,
    divide,
    packed_chunks,
    table_keys,
)
from hf_sketch.sketches.multi_tensor.given import DTYPES, AddressTable, Given
from hf_sketch.sketches.srht import SRHT

_WITHOUT: Final = 4  # in place of a dtype where there are no tensors


class Lift:
    """Applies the transpose of a sketch to the numbers of a row, again and again.

    Blocks are lifted, packed vectors among them, then matrices, and small tensors are
    copied from the packed vectors: three launches, which write each element once.

    Args:
        tensors: how they are sketched, blocks by SRHT.
        device: where they are.
    """

    def __init__(self, tensors: GradientTensors, device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._division = divide(tensors, device)
        self._addresses = AddressTable(tensors.packed_sizes, device, wide=True)
        self._bases = AddressTable([0] * len(tensors.packed_sizes), device, wide=True)
        chunks = torch.tensor(packed_chunks(tensors), dtype=torch.int64)
        self._chunks = chunks.view(-1, 4).to(device)

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the kernels write tensors like these."""
        return all(
            x.dtype in DTYPES
            and x.device == self._device
            and x.layout == torch.strided
            and x.is_contiguous()
            for x in tensors
        )

    def lift(
        self,
        vector: Tensor,
        tensors: Sequence[Tensor],
        base: Sequence[Tensor] | None = None,
    ) -> None:
        """Set tensors to what is lifted, added to their base in float32.

        Shapes:
            vector (groups * out_size,), float32

        Args:
            vector: the numbers.
            tensors: what is written, contiguous, in order.
            base: tensors of the same sizes; zeros by default.
        """
        vector = vector.contiguous()
        given = self._addresses.give(tensors)
        bases = self._bases.give([None] * len(tensors) if base is None else base)
        kinds = {"KIND": given.kind, "BASE": _WITHOUT if base is None else bases.kind}
        aligned = given.aligned and bases.aligned
        self._lift_blocks(vector, given, bases, aligned, kinds)
        self._lift_matrices(vector, given, bases, aligned, kinds)
        if len(self._chunks):
            tables = given.table, bases.table, self._chunks, given.packed
            self._launch("spread", len(self._chunks), *tables, **kinds)

    def _lift_blocks(
        self,
        vector: Tensor,
        given: Given,
        bases: Given,
        aligned: bool,
        kinds: dict[str, int],
    ) -> None:
        of = self._division.blocks
        if not len(of.runs):
            return
        operator = self._tensors.blocked[0].operator
        assert isinstance(operator, SRHT)
        factors, leading = self._division.transform
        self._launch(
            "lift_blocks",
            len(of.runs),
            given.table,
            bases.table,
            of.streams,
            of.units,
            of.runs,
            factors,
            leading,
            vector,
            self._tensors.out_size,
            operator.mixed_shape[1],
            operator.scale,
            *table_keys(operator),
            LEADING=len(leading),
            BLOCK=operator.block,
            RUN=operator.signs("before").run,
            ALIGNED=aligned and of.aligned,
            BFLOAT16=self._device.type != "cpu",
            num_warps=len(leading),
            **kinds,
        )

    def _lift_matrices(
        self,
        vector: Tensor,
        given: Given,
        bases: Given,
        aligned: bool,
        kinds: dict[str, int],
    ) -> None:
        of = self._division.matrices
        if not len(of.runs):
            return
        self._launch(
            "lift_matrices",
            len(of.runs),
            given.table,
            bases.table,
            of.matrices,
            of.items,
            of.runs,
            of.orders,
            vector,
            self._tensors.out_size,
            SHAPES=of.shapes,
            COUNT=len(of.shapes),
            ALIGNED=aligned and of.aligned,
            BFLOAT16=self._device.type != "cpu",
            **kinds,
        )

    def _launch(self, name: str, programs: int, *args: Any, **kwargs: Any) -> None:
        """Launch a kernel; its module needs Triton, so it is imported here."""
        kernels = importlib.import_module(f"{__package__}.lift_kernels")
        with torch.cuda.device_of(self._chunks):
            getattr(kernels, name)[programs,](*args, **kwargs, enable_fp_fusion=True)
