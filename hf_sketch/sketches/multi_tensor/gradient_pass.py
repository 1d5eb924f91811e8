"""A gradient of any number of tensors, sketched in at most five launches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sketch.sketches.multi_tensor.division import (
    CHUNK,
    LONG_WARPS,
    GradientTensors,
    divide,
    packed_chunks,
    scale_tables,
    table_keys,
    witness_chunks,
)
from hf_sketch.sketches.multi_tensor.given import DTYPES, AddressTable, Given
from hf_sketch.sketches.multi_tensor.launching import launch
from hf_sketch.sketches.srht import SRHT


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
    calls on one stream. Gradients may be shards of tensors: each process then reads its
    own, and what they add up is joined before the row is finished.

    Args:
        tensors: how they are sketched.
        device: where they are.
        witnesses: elements at the start of each tensor from which `finish` computes
            the factor of clipping.
        rounding: the relative change that is no clipping.
        join: adds up vectors of all processes, if gradients are shards.
    """

    def __init__(
        self,
        tensors: GradientTensors,
        device: torch.device,
        witnesses: int = 0,
        rounding: float = 0.0,
        join: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._tensors, self._device, self._rounding = tensors, device, rounding
        self._join = join
        firsts = [part.start for part in tensors.parts]
        self._addresses = AddressTable(tensors.packed_sizes, device, firsts=firsts)
        seen, copied = witness_chunks(tensors, witnesses), packed_chunks(tensors)
        self._witnesses = len(seen)
        chunks = torch.tensor([*seen, *copied], dtype=torch.int64)
        self._chunks = chunks.view(-1, 4).to(device)
        # Apart, since Triton compiles again for memory that is not aligned alike.
        self._before = torch.zeros(len(chunks), device=device)
        self._now = torch.zeros(len(chunks), device=device)
        self._scales, self._factors = scale_tables(tensors, device)
        of = self._division = divide(tensors, device)
        # Numbers that no program sums stay zero.
        partial = torch.zeros(of.partial, device=device)
        self._partial, self._whole, self._long = (
            partial,
            *partial.split([of.whole, of.partial - of.whole]),
        )
        programs = len(of.blocks.runs) + len(of.matrices.runs)
        self._squares = torch.zeros(programs, device=device)
        self._scratch = torch.empty(len(of.blocks.runs) * of.unit, device=device)
        # In one vector, which processes join at once.
        self._sums = torch.zeros(of.rows.length + 3, device=device)
        self._added, self._norms = self._sums.split([of.rows.length, 3])

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
        return self.finish(gradients, 1.0).row

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
        of, device = self._tensors, self._device
        given, tables = self._give(gradients), self._division.rows
        finite = torch.empty(1, dtype=torch.uint8, device=device)
        self._add_up(given, finite)
        if self._join is not None:
            self._sums.copy_(self._join(self._sums))
        row = torch.empty(of.groups * of.out_size, device=device)
        norm, factor = (torch.empty(1, device=device) for _ in range(2))
        self._launch(
            "finish_row",
            (of.groups, -(-of.out_size // CHUNK)),
            self._added,
            tables.terms,
            tables.ranges,
            tables.places,
            tables.weights,
            tables.factors,
            self._norms,
            row,
            norm,
            factor,
            finite,
            of.out_size,
            loss_scale,
            ROUNDING=self._rounding,
            ROTATES=tables.rotates,
            BFLOAT16=device.type != "cpu",
        )
        return StepFigures(row, norm, factor, finite.view(torch.bool))

    def _give(self, gradients: Sequence[Tensor | None]) -> Given:
        """Return the table of gradients, which must be of the right sizes."""
        for part, x in zip(self._tensors.parts, gradients, strict=True):
            if x is not None and x.numel() != len(part):
                raise ValueError(
                    f"a gradient must have {len(part)} elements, as its parameter has "
                    f"here, got {x.numel()}: pass them in the order of the map."
                )
        return self._addresses.give(gradients)

    def _add_up(self, given: Given, finite: Tensor) -> None:
        """Compute the sums that the row is made of, and set a flag to 1."""
        tables = self._division.rows
        self._gather(given, 0, len(self._chunks), self._now)
        if self._division.unit:
            self._sum_long_blocks(given)
        else:
            self._sum_blocks(given)
        self._sum_matrices(given)
        self._launch(
            "add_rows",
            (len(tables.parts),),
            self._partial,
            tables.parts,
            tables.sums,
            tables.magnitudes,
            self._squares,
            len(self._squares),
            self._now,
            self._before,
            self._witnesses,
            self._added,
            self._norms,
            finite,
        )

    def _gather(self, given: Given, first: int, last: int, squares: Tensor) -> None:
        """Copy some chunks, and note the sums of their squares."""
        if first == last:
            return
        chunks = self._chunks[first:last], given.packed, squares[first:]
        grid = (last - first,)
        self._launch("gather", grid, given.table, *chunks, KIND=given.kind)

    def _sum_blocks(self, given: Given) -> None:
        """Add up the blocks of all tensors."""
        of = self._division.blocks
        if not len(of.runs):
            return
        operator = self._tensors.blocked[0].operator
        assert isinstance(operator, SRHT)
        factors, leading = self._division.transform
        self._launch(
            "sum_blocks",
            (len(of.runs),),
            given.table,
            of.streams,
            of.units,
            of.runs,
            factors,
            leading,
            self._scales,
            self._whole,
            self._squares,
            self._tensors.out_size,
            operator.scale,
            *table_keys(operator),
            LEADING=len(leading),
            FOLDS=max(1, CHUNK // operator.block),
            RUN=operator.signs("before").run,
            KIND=given.kind,
            ALIGNED=given.aligned and of.aligned,
            SCALED=bool(self._tensors.scales),
            BFLOAT16=self._device.type != "cpu",
            num_warps=len(leading),
        )

    def _sum_long_blocks(self, given: Given) -> None:
        """Do the same where blocks are longer, in memory of each program."""
        of, operator = self._division.blocks, self._tensors.blocked[0].operator
        factors, leading = self._division.transform
        self._launch(
            "sum_long_blocks",
            (len(of.runs),),
            given.table,
            of.streams,
            of.units,
            of.runs,
            factors,
            leading,
            self._scales,
            self._scratch,
            self._long,
            self._squares,
            *table_keys(operator),
            LEADING=leading.shape[1],
            RUN=operator.signs("before").run,
            KIND=given.kind,
            ALIGNED=given.aligned and of.aligned,
            SCALED=bool(self._tensors.scales),
            BFLOAT16=self._device.type != "cpu",
            num_warps=LONG_WARPS,
        )

    def _sum_matrices(self, given: Given) -> None:
        """Fold and rotate all matrices."""
        of = self._division.matrices
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
            self._scales,
            self._whole,
            self._squares[len(self._division.blocks.runs) :],
            self._tensors.out_size,
            SHAPES=of.shapes,
            COUNT=len(of.shapes),
            KIND=given.kind,
            ALIGNED=given.aligned and of.aligned,
            SCALED=bool(self._tensors.scales),
            BFLOAT16=self._device.type != "cpu",
        )

    def _launch(
        self, name: str, grid: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> None:
        """Launch a kernel."""
        launch(self._squares, name, grid, *args, **kwargs)
