"""The sum over Hadamard blocks on a CUDA device, in one pass over the memory."""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.mixing import (
    Mix,
    Permuted,
    mixing,
    square_factors,
)
from hf_sketch.sketches.transforms.signs import StreamSigns

_INSTALLED = importlib.util.find_spec("triton") is not None
_SIDE = 32
_TILE = _SIDE**2
_LONGEST_WHOLE = 4 * _TILE  # what one program of four warps keeps in registers
_MOST_LEADING = 8
_LONGEST = _MOST_LEADING * _SIDE * _TILE  # in strips of 32 columns, eight warps
_CHUNK_ELEMENTS = 2**23  # 32 MiB in float32: stays in the cache between two kernels
_TILES_AT_ONCE = 4
_MOST_SEGMENTS = 2**16 - 1  # of a grid's third dimension
_WARPS_PER_PROCESSOR = 12  # as many as there are registers for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HadamardBlocks(Protocol):
    """What the kernels read of an operator: properties of `BlockedSketch`."""

    permuted: ClassVar[Permuted]

    @property
    def seed(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def mixed_shape(self) -> tuple[int, int]: ...
    @property
    def kind(self) -> Mix: ...
    def signs(self, role: str) -> StreamSigns: ...
    def places(self, start: int, stop: int) -> Tensor: ...


def can_fuse(operator: HadamardBlocks, rows: Tensor) -> bool:
    """Whether `accumulate_fused` is for this operator and for rows like these."""
    if not (_INSTALLED and rows.is_cuda and torch.version.hip is None):
        return False
    if torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False  # no products in bfloat16
    if rows.dtype not in _DTYPES or rows.stride(1) != 1 or not rows.numel():
        return False
    if operator.kind != "hadamard" or operator.block_size is None:
        return False
    segments = operator.mixed_shape[0]
    if segments > 1:
        return segments <= _MOST_SEGMENTS and _TILE <= operator.block <= _LONGEST_WHOLE
    return operator.block <= _LONGEST


def accumulate_fused(
    operator: HadamardBlocks, rows: Tensor, first_block: int = 0
) -> Tensor:
    """`BlockedSketch.accumulate` in Triton, for what `can_fuse` admits.

    Blocks of at most 2**12 elements are flipped, transformed, flipped and added up
    without leaving the registers. Longer ones go through a float32 copy of 2**23
    elements at most, in two kernels: the transform's last two factors, then the others.
    Short blocks are handled several at a time, as one with a block-diagonal transform.
    Each program adds up blocks of its own, in order, and one sum over the programs
    follows: the result depends on the device's size, not on its scheduling.

    Shapes:
        rows (b, length), the coordinates from block `first_block` on; float32, bfloat16
            or float16, the last dimension contiguous
        returns (b, segments * elements of each), float32
    """
    batch, length = rows.shape
    segments, width = operator.mixed_shape
    span = _span(operator.block, first_block, length)
    add = _add_whole if span.unit <= _LONGEST_WHOLE else _add_striped
    kept = width if span.unit == operator.block else span.unit
    with torch.cuda.device_of(rows):
        total = add(operator, rows, span, kept)
    if kept > width:
        shape = (batch, span.unit // operator.block, operator.block)
        total = total.view(shape).sum(1)[:, :width]
    return total.reshape(batch, segments * width)


@dataclass(frozen=True)
class _Span:
    """The units of work that hold the coordinates from `origin` on.

    Args:
        origin: first coordinate of the rows.
        start: first coordinate of the first unit, a multiple of `unit`.
        unit: a block, or several short ones.
        units: how many.
    """

    origin: int
    start: int
    unit: int
    units: int


def _span(block: int, first_block: int, length: int) -> _Span:
    unit = max(block, _TILE if block <= _LONGEST_WHOLE else _SIDE * _TILE)
    origin = first_block * block
    start = origin // unit * unit
    return _Span(origin, start, unit, -(-(origin + length - start) // unit))


def _add_whole(
    operator: HadamardBlocks, rows: Tensor, span: _Span, kept: int
) -> Tensor:
    """Sums of blocks that one program holds: (b, segments * kept)."""
    batch, segments = len(rows), operator.mixed_shape[0]
    factors, leading = _factors(operator, 2, rows.device)
    order = bounds = factors
    if segments > 1:
        first = span.start // span.unit
        order, bounds = _order(operator, first, first + span.units, rows.device)
    warps = len(leading)
    splits = _splits(rows, warps, batch * segments, -(-span.units // segments))
    partial = torch.empty(batch, splits, segments * kept, device=rows.device)
    _kernels().sum_whole[batch, splits, segments](
        rows,
        partial,
        factors,
        leading,
        order,
        bounds,
        rows.stride(0),
        rows.shape[1],
        span.origin,
        span.start,
        span.units,
        kept,
        *operator.signs("before").keys,
        *operator.signs("after").keys,
        LEADING=len(leading),
        RUN=operator.signs("before").run,
        ORDERED=segments > 1,
        BFLOAT16=rows.is_cuda,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return partial.sum(1)


def _add_striped(
    operator: HadamardBlocks, rows: Tensor, span: _Span, kept: int
) -> Tensor:
    """Sums of longer blocks, a chunk of some rows at a time: (b, kept)."""
    warps = len(_factors(operator, 3, rows.device)[1])
    totals: list[Tensor] = []
    for part in rows.split(max(1, _CHUNK_ELEMENTS // span.unit)):
        batch = len(part)
        most = min(span.units, max(1, _CHUNK_ELEMENTS // (batch * span.unit)))
        scratch = torch.empty(batch, most * span.unit, device=rows.device)
        splits = _splits(rows, warps, batch * _SIDE, most)
        partial = torch.zeros(batch, splits, kept, device=rows.device)
        for low in range(0, span.units, most):
            start = span.start + low * span.unit
            units = min(most, span.units - low)
            chunk = _Span(span.origin, start, span.unit, units)
            _rotate_tiles(operator, part, chunk, scratch)
            _add_strips(operator, scratch, chunk, partial)
        totals.append(partial.sum(1))
    return torch.cat(totals)


def _rotate_tiles(
    operator: HadamardBlocks, rows: Tensor, chunk: _Span, scratch: Tensor
) -> None:
    """The last two factors of the transform of a chunk, into `scratch`."""
    factors, _ = _factors(operator, 3, rows.device)
    units = chunk.units * chunk.unit // (_TILES_AT_ONCE * _TILE)
    splits = _splits(rows, _TILES_AT_ONCE, len(rows), units)
    signs = operator.signs("before")
    _kernels().rotate_tiles[len(rows), splits](
        rows,
        scratch,
        factors,
        rows.stride(0),
        rows.shape[1],
        chunk.origin,
        chunk.start,
        units,
        *signs.keys,
        TILES=_TILES_AT_ONCE,
        RUN=signs.run,
        BFLOAT16=rows.is_cuda,
        num_warps=_TILES_AT_ONCE,
        enable_fp_fusion=True,
    )


def _add_strips(
    operator: HadamardBlocks, scratch: Tensor, chunk: _Span, partial: Tensor
) -> None:
    """The other factors of a chunk, added to `partial`: (b, splits, kept)."""
    factors, leading = _factors(operator, 3, scratch.device)
    batch, splits, kept = partial.shape
    signs = operator.signs("after")
    _kernels().sum_strips[batch, splits, _SIDE](
        scratch,
        partial,
        factors,
        leading,
        chunk.start,
        chunk.units,
        kept,
        *signs.keys,
        LEADING=len(leading),
        RUN=signs.run,
        BFLOAT16=scratch.is_cuda,
        num_warps=len(leading),
        enable_fp_fusion=True,
    )


def whole_factors(
    operator: HadamardBlocks, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The factors of blocks that one program holds; see `_factors`."""
    return _factors(operator, 2, device)


def _factors(
    operator: HadamardBlocks, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The transform's factors, the last first: (count, 32, 32) and the leading one."""
    drawn = operator.block, operator.seed, operator.permuted
    return _factors_held(*drawn, count, device)


@lru_cache(maxsize=16)  # a memo of a pure function: 13 KiB each
def _factors_held(
    block: int, seed: int, permuted: Permuted, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    mixed = mixing("hadamard", block, seed, permuted)
    square, leading = square_factors(mixed, count)
    assert len(leading) <= _MOST_LEADING, "the block is longer than the kernels hold"
    return square.to(device), leading.to(device)


@lru_cache(maxsize=512)  # a memo of a pure function: 4 bytes a block
def _order(
    operator: HadamardBlocks, start: int, stop: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The blocks by segment, from 0 on, and where each segment starts and ends."""
    places = operator.places(start, stop)
    ends = places.bincount(minlength=operator.mixed_shape[0]).cumsum(0)
    bounds = torch.nn.functional.pad(ends, (1, 0))
    order = places.argsort(stable=True)
    return order.to(torch.int32).to(device), bounds.to(torch.int32).to(device)


def _splits(rows: Tensor, warps: int, others: int, units: int) -> int:
    """Programs that share the units, so that all programs together fill the device.

    Args:
        rows: a tensor on the device.
        warps: number of warps per program.
        others: programs for each of them.
        units: how many there are to share.
    """
    processors = 1
    if rows.is_cuda:
        device = torch.cuda.get_device_properties(rows.device)
        processors = device.multi_processor_count
    programs = processors * (_WARPS_PER_PROCESSOR // warps)
    return max(1, min(units, programs // others))


def _kernels() -> Any:
    """The module of the kernels, imported where Triton is there and needed."""
    return importlib.import_module("hf_sketch.sketches.transforms.hadamard_kernels")
