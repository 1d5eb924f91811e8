"""A vector of sketch numbers, lifted to any number of tensors in three launches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hf_sketch.sketches.multi_tensor.division import (
    LONG_WARPS,
    GradientTensors,
    divide,
    packed_chunks,
    table_keys,
)
from hf_sketch.sketches.multi_tensor.finishing import FinishTransposed
from hf_sketch.sketches.multi_tensor.given import DTYPES, AddressTable, Given
from hf_sketch.sketches.multi_tensor.launching import launch
from hf_sketch.sketches.srht import SRHT
from hf_sketch.sketches.transforms.precision import exact

_WITHOUT: Final = 4  # in place of a dtype where there are no tensors


@dataclass(frozen=True)
class _Places:
    """Where the elements that are lifted go.

    Args:
        given: the tensors that are written.
        bases: tensors that are added.
        kinds: the places of their dtypes.
    """

    given: Given
    bases: Given
    kinds: Mapping[str, int]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.given.table, self.bases.table

    @property
    def aligned(self) -> bool:
        return self.given.aligned and self.bases.aligned


class Lift:
    """Applies the transpose of a sketch to the numbers of a row, again and again.

    Blocks are lifted, packed vectors among them, then matrices, and small tensors are
    copied from the packed vectors: three launches, which write each element once.

    Args:
        tensors: how they are sketched.
        device: where they are.
    """

    def __init__(self, tensors: GradientTensors, device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._division = divide(tensors, device)
        self._addresses = AddressTable(tensors.packed_sizes, device, wide=True)
        self._bases = AddressTable([0] * len(tensors.packed_sizes), device, wide=True)
        chunks = torch.tensor(packed_chunks(tensors), dtype=torch.int64)
        self._chunks = chunks.view(-1, 4).to(device)
        programs, unit = len(self._division.blocks.runs), self._division.unit
        self._scratch = torch.empty(programs * unit, device=device)
        self._finishes = {
            of.operator.block: FinishTransposed.on(device, of.operator)
            for of in self._division.long
        }

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
        to = _Places(given, bases, kinds)
        self._lift_blocks(vector, to)
        self._lift_matrices(vector, to)
        if len(self._chunks):
            tables = *to.tables, self._chunks, given.packed
            self._launch("spread", len(self._chunks), *tables, **kinds)

    def _lift_blocks(self, vector: Tensor, to: _Places) -> None:
        """Lift all blocks. Long ones are lifted in scratch memory, per program."""
        of = self._division.blocks
        if not len(of.runs):
            return
        operator = self._tensors.blocked[0].operator
        factors, leading = self._division.transform
        tables = *to.tables, of.streams, of.units, of.runs, factors, leading
        settings = {
            "LEADING": leading.shape[1],
            "RUN": operator.signs("before").run,
            "ALIGNED": to.aligned and of.aligned,
            "BFLOAT16": self._device.type != "cpu",
            **to.kinds,
        }
        if self._division.long:
            numbers = self._scratch, self._mixed(vector)
            settings["num_warps"] = LONG_WARPS
            name = "lift_long_blocks"
        else:
            assert isinstance(operator, SRHT)
            kept = operator.mixed_shape[1]
            numbers = vector, self._tensors.out_size, kept, operator.scale
            settings |= {"BLOCK": operator.block, "num_warps": len(leading)}
            name = "lift_blocks"
        keys = table_keys(operator)
        self._launch(name, len(of.runs), *tables, *numbers, *keys, **settings)

    @exact
    def _mixed(self, vector: Tensor) -> Tensor:
        """Undo the finish of each long sum, and repeat it for each block of a unit.

        Shapes:
            vector (groups * out_size,) -> (sums, unit)
        """
        long, unit = self._division.long, self._division.unit
        vectors = vector.view(-1, self._tensors.out_size)
        found = {block: finish(vectors) for block, finish in self._finishes.items()}
        return torch.stack(
            [
                found[of.operator.block][of.group].repeat(unit // of.operator.block)
                for of in long
            ]
        )

    def _lift_matrices(self, vector: Tensor, to: _Places) -> None:
        of = self._division.matrices
        if not len(of.runs):
            return
        self._launch(
            "lift_matrices",
            len(of.runs),
            *to.tables,
            of.matrices,
            of.items,
            of.runs,
            of.orders,
            vector,
            self._tensors.out_size,
            SHAPES=of.shapes,
            COUNT=len(of.shapes),
            ALIGNED=to.aligned and of.aligned,
            BFLOAT16=self._device.type != "cpu",
            **to.kinds,
        )

    def _launch(self, name: str, programs: int, *args: Any, **kwargs: Any) -> None:
        """Launch a kernel."""
        launch(self._chunks, name, (programs,), *args, **kwargs)
