"""A gradient of any number of tensors, sketched in at most five launches."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hf_sketch.sketches.multi_tensor.blocks import BlockedTensor, block_tables
from hf_sketch.sketches.multi_tensor.given import DTYPES, AddressTable, Given
from hf_sketch.sketches.multi_tensor.matrices import GroupedTensor, matrix_tables
from hf_sketch.sketches.transforms.fused import whole_factors

CHUNK: Final = 2**10  # elements that a program copies or finishes
_PROGRAMS: Final = 2**10  # of a kernel, about: a constant, so that sums have one order
_COLUMNS: Final = 2**5  # numbers that a program adds up
_NOWHERE: Final = -1
_MODULES: Final = {
    "gather": "row_kernels",
    "sum_blocks": "block_kernels",
    "sum_matrices": "matrix_kernels",
    "add_rows": "row_kernels",
    "finish_row": "row_kernels",
}


@dataclass(frozen=True)
class GradientTensors:
    """How a gradient's tensors are sketched.

    Args:
        sizes: elements of each tensor, in order.
        blocked: tensors that are sketched in blocks, and packed vectors, whose places
            come after those of the tensors.
        grouped: tensors that are sketched as matrices.
        packed: where others go among the packed vectors, which lie end to end.
        packed_sizes: elements of each packed vector, multiples of 1024.
        out_size: numbers per group of layers.
        groups: groups of layers.
    """

    sizes: Sequence[int]
    blocked: Sequence[BlockedTensor]
    grouped: Sequence[GroupedTensor]
    packed: Mapping[int, int]
    packed_sizes: Sequence[int]
    out_size: int
    groups: int


@dataclass(frozen=True)
class StepFigures:
    """The row of a step, on the device.

    Args:
        row: (groups * out_size,), the gradient's sketch as it is after clipping.
        norm: (1,), of the gradient before clipping.
        clip_factor: (1,), what clipping has multiplied it by.
        finite: (1,), whether all of the row is.
    """

    row: Tensor
    norm: Tensor
    clip_factor: Tensor
    finite: Tensor


class GradientPass:
    """Sketches gradients of the same tensors again and again.

    Signs and transforms are those of `ModelSketch.sketch`; sums are in another order,
    which is the same on all devices. Small tensors are copied end to end, blocks are
    flipped, transformed and added up, matrices are folded and rotated, partial sums are
    added up, and the row is finished: five launches. Their memory is kept, and serves
    calls on one stream.

    Args:
        tensors: how they are sketched.
        device: where they are.
        witnesses: elements at the start of each tensor from which `finish` computes
            the factor of clipping.
        rounding: the relative change that is no clipping.
    """

    def __init__(
        self,
        tensors: GradientTensors,
        device: torch.device,
        witnesses: int = 0,
        rounding: float = 0.0,
    ) -> None:
        self._tensors, self._device, self._rounding = tensors, device, rounding
        self._addresses = AddressTable(tensors.packed_sizes, device)
        seen, copied = _witness_chunks(tensors, witnesses), _packed_chunks(tensors)
        self._witnesses = len(seen)
        chunks = torch.tensor([*seen, *copied], dtype=torch.int64)
        self._chunks = chunks.view(-1, 4).to(device)
        # Apart, since Triton compiles again for memory that is not aligned alike.
        self._before = torch.zeros(len(chunks), device=device)
        self._now = torch.zeros(len(chunks), device=device)
        self._sums = torch.zeros(3, device=device)
        self._divide_work()

    def _divide_work(self) -> None:
        """Make the programs' tables, and give each a row of partial sums."""
        of, device = self._tensors, self._device
        self._blocks = block_tables(of.blocked, of.groups, _PROGRAMS)
        self._matrices = matrix_tables(of.grouped, of.groups, _PROGRAMS)
        rows = torch.tensor([self._blocks.rows, self._matrices.rows])
        ends = rows.sum(0).cumsum(0)
        starts = ends - rows.sum(0)
        self._blocks = self._blocks.placed(starts, device)
        self._matrices = self._matrices.placed(starts + rows[0], device)
        self._ranges = torch.stack([starts, ends], 1).to(device, torch.int32)
        # Numbers that no program sums stay zero.
        self._partial = torch.zeros(int(ends[-1]), of.out_size, device=device)
        programs = len(self._blocks.runs) + len(self._matrices.runs)
        self._squares = torch.zeros(programs, device=device)

    def takes(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether the kernels read gradients like these."""
        return not torch.compiler.is_compiling() and all(
            type(x) is Tensor
            and x.dtype in DTYPES
            and x.device == self._device
            and x.layout == torch.strided
            for x in gradients
            if x is not None
        )

    def sketch(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the sketch of a gradient: (groups * out_size,), float32.

        Args:
            gradients: gradients of each tensor, in order; None counts as zero.
        """
        row, _ = self._sum(self._give(gradients), self._witnesses)
        return row

    def note(self, gradients: Sequence[Tensor | None]) -> None:
        """Look at the witnesses before gradients are clipped."""
        self._gather(self._give(gradients), 0, self._witnesses, self._before)

    def finish(
        self, gradients: Sequence[Tensor | None], loss_scale: float
    ) -> StepFigures:
        """Return the row of a step whose gradients `note` has seen.

        Args:
            gradients: see `sketch`.
            loss_scale: what the loss was multiplied by; clipping may undo it.
        """
        row, finite = self._sum(self._give(gradients), 0)
        norm, factor = (torch.empty(1, device=self._device) for _ in range(2))
        self._launch(
            "finish_row",
            (-(-len(row) // CHUNK),),
            row,
            self._sums,
            norm,
            factor,
            finite,
            len(row),
            loss_scale,
            ROUNDING=self._rounding,
        )
        return StepFigures(row, norm, factor, finite.view(torch.bool))

    def _give(self, gradients: Sequence[Tensor | None]) -> Given:
        """Return the table of gradients, which must be of the right sizes."""
        for size, x in zip(self._tensors.sizes, gradients, strict=True):
            if x is not None and x.numel() != size:
                raise ValueError(
                    f"a gradient must have {size} elements, its parameter's, got "
                    f"{x.numel()}: pass whole gradients, in the order of the map."
                )
        return self._addresses.give(gradients)

    def _sum(self, given: Given, first_chunk: int) -> tuple[Tensor, Tensor]:
        """Return the sketch, and a flag of 1."""
        of = self._tensors
        self._gather(given, first_chunk, len(self._chunks), self._now)
        self._sum_blocks(given)
        self._sum_matrices(given)
        row = torch.empty(of.groups * of.out_size, device=self._device)
        finite = torch.empty(1, dtype=torch.uint8, device=self._device)
        self._launch(
            "add_rows",
            (of.groups, -(-of.out_size // _COLUMNS)),
            self._partial,
            self._ranges,
            self._squares,
            len(self._squares),
            self._now,
            self._before,
            self._witnesses,
            row,
            self._sums,
            finite,
            of.out_size,
        )
        return row, finite

    def _gather(self, given: Given, first: int, last: int, squares: Tensor) -> None:
        """Copy some chunks, and note the sums of their squares."""
        if first == last:
            return
        chunks = self._chunks[first:last], given.packed, squares[first:]
        grid = (last - first,)
        self._launch("gather", grid, given.table, *chunks, KIND=given.kind)

    def _sum_blocks(self, given: Given) -> None:
        """Add up the blocks of all tensors."""
        of = self._blocks
        if not len(of.runs):
            return
        operator = self._tensors.blocked[0].operator
        factors, leading = whole_factors(operator, self._device)
        self._launch(
            "sum_blocks",
            (len(of.runs),),
            given.table,
            of.streams,
            of.units,
            of.runs,
            factors,
            leading,
            self._partial,
            self._squares,
            self._tensors.out_size,
            operator.scale,
            *operator.signs("before").keys[2:],
            *operator.signs("after").keys[2:],
            LEADING=len(leading),
            FOLDS=max(1, CHUNK // operator.block),
            RUN=operator.signs("before").run,
            KIND=given.kind,
            ALIGNED=given.aligned and of.aligned,
            BFLOAT16=self._device.type != "cpu",
            num_warps=len(leading),
        )

    def _sum_matrices(self, given: Given) -> None:
        """Fold and rotate all matrices."""
        of = self._matrices
        if not len(of.runs):
            return
        self._launch(
            "sum_matrices",
            (len(of.runs),),
            given.table,
            of.matrices,
            of.items,
            of.runs,
            of.orders,
            self._partial,
            self._squares[len(self._blocks.runs) :],
            self._tensors.out_size,
            SHAPES=of.shapes,
            COUNT=len(of.shapes),
            KIND=given.kind,
            ALIGNED=given.aligned and of.aligned,
            BFLOAT16=self._device.type != "cpu",
        )

    def _launch(
        self, name: str, grid: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> None:
        """Launch a kernel; its module needs Triton, so it is imported here."""
        kernels = importlib.import_module(f"{__package__}.{_MODULES[name]}")
        with torch.cuda.device_of(self._partial):
            getattr(kernels, name)[grid](*args, **kwargs, enable_fp_fusion=True)


def _witness_chunks(of: GradientTensors, each: int) -> list[tuple[int, int, int, int]]:
    """Return chunks of each tensor's first elements, which are copied nowhere."""
    return [
        (place, start, min(CHUNK, min(each, size) - start), _NOWHERE)
        for place, size in enumerate(of.sizes)
        for start in range(0, min(each, size), CHUNK)
    ]


def _packed_chunks(of: GradientTensors) -> list[tuple[int, int, int, int]]:
    """Return chunks of the small tensors, and where they are copied to."""
    return [
        (place, start, min(CHUNK, of.sizes[place] - start), to + start)
        for place, to in of.packed.items()
        for start in range(0, of.sizes[place], CHUNK)
    ]
