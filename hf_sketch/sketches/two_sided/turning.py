"""Folds and rotates sides of outer products, in one launch per tensor that is read."""

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.transforms.devices import can_launch
from hf_sketch.sketches.transforms.random import CounterRandom

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = 2**13  # that a program folds at a time: 64 registers per thread
_MOST_TOKENS = 16  # of a program
_LEAST = 16  # numbers along each dimension of what is multiplied
_MOST_GROUPS = 64
_BITS = 32  # of a word of signs


class TwoSided(Protocol):
    """What the kernel reads of an operator: properties of `Grouped`."""

    @property
    def sides(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def group_sizes(self) -> tuple[int, int]: ...
    def side_signs(self, side: int) -> CounterRandom: ...
    def group_order(self, side: int) -> Tensor: ...


OneSide = tuple[TwoSided, int]  # an operator, and which of its sides


@lru_cache(maxsize=16)  # a memo of a pure function, asked for each layer
def launches(device: torch.device) -> bool:
    """Return whether a device runs the kernel."""
    return can_launch(device)


def can_turn(side: Side, of: OneSide, like: Tensor) -> bool:
    """Return whether `turn` is for a side that is added to rows like these."""
    x, (operator, place) = side.numbers, of
    if not launches(x.device):
        return False
    plain = not side.folded and side.expert is None
    fits = operator.groups <= _MOST_GROUPS and _width(operator, place) <= _NUMBERS
    scaled = side.scale is None or side.scale.dtype == torch.float32
    known = x.dtype in _DTYPES and like.dtype == torch.float32 and scaled
    return plain and fits and known


def turn(
    x: Tensor, sides: Sequence[OneSide], scales: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Fold and rotate vectors for several sides that take the same.

    Shapes:
        x (b, t, length)
        returns (b * kept, t, size), for each side

    Args:
        x: the vectors, which `can_turn` allows for all sides.
        sides: sides with groups of equal sizes.
        scales: factors of the vectors' elements for each side, (length,); none by
            default.
    """
    signs, orders = _tables(tuple(sides), x.device)
    count = 1 << (len(sides) - 1).bit_length()
    lines, turned, sizes = _shapes(x, sides, count)
    # Without scales any memory will do, as it is not read.
    factors = torch.cat([*scales]) if len(scales) > 1 else next(iter(scales), turned)
    _launch(
        "turn_sides",
        _grid(x, sizes),
        lines,
        lines.stride(0),
        *x.shape[1:],
        factors,
        signs,
        signs.shape[1],
        orders,
        turned,
        sides[0][0].kept,
        COUNT=len(sides),
        SIDES=count,
        **sizes,
        SCALED=bool(scales),
        BFLOAT16=x.is_cuda,
    )
    return [*turned]


def turn_softmax(scores: Tensor, chosen: Tensor, scale: float, side: OneSide) -> Tensor:
    """Fold and rotate softmax(scale * scores) minus one-hot vectors, as `turn` does.

    Shapes:
        scores (b, t, length), integer chosen (b, t)
        returns (b * kept, t, size)

    Args:
        scores: logits in a dtype that `can_turn` allows.
        chosen: the place of each one-hot vector's 1.
        scale: a factor of the scores.
        side: the side that they are folded for.
    """
    signs, orders = _tables((side,), scores.device)
    lines, turned, sizes = _shapes(scores, [side], 1)
    _launch(
        "turn_softmax",
        _grid(scores, sizes),
        lines,
        lines.stride(0),
        *scores.shape[1:],
        scale,
        chosen.contiguous(),
        signs,
        orders,
        turned,
        side[0].kept,
        **sizes,
        BFLOAT16=scores.is_cuda,
    )
    return turned[0]


def _shapes(
    x: Tensor, sides: Sequence[OneSide], count: int
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return vectors one below the other, memory for results, and constants.

    Args:
        x: the vectors.
        sides: the sides that they are folded for.
        count: their number, rounded up to a power of two.
    """
    operator, place = sides[0]
    examples, tokens, length = x.shape
    lines = x.reshape(-1, length)
    lines = lines if lines.stride(1) == 1 else lines.contiguous()
    size, padded = operator.group_sizes[place], max(operator.groups, _LEAST)
    shape = len(sides), examples * operator.kept, tokens, size
    least, most = -(-_LEAST // size), _NUMBERS // (count * padded * size)
    sizes = {"GROUPS": operator.groups, "PADDED": padded, "SIZE": size}
    sizes["AT_ONCE"] = max(least, min(most, _MOST_TOKENS))
    return lines, torch.empty(shape, device=x.device), sizes


def _grid(x: Tensor, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the numbers of programs: of each example, and of its tokens."""
    return len(x), -(-x.shape[1] // sizes["AT_ONCE"])


def _launch(
    name: str, grid: tuple[int, int], x: Tensor, *args: Any, **constants: Any
) -> None:
    """Launch a kernel; its module needs Triton, so it is imported here."""
    kernels = importlib.import_module(f"{__package__}.turn_kernels")
    with torch.cuda.device_of(x):
        getattr(kernels, name)[grid](x, *args, **constants)


def together(sides: Sequence[OneSide]) -> list[list[int]]:
    """Return the places of sides that one launch turns, those of each launch."""
    found: dict[object, list[int]] = {}
    for place, (operator, side) in enumerate(sides):
        size = operator.groups, operator.kept, operator.group_sizes[side]
        found.setdefault(size, []).append(place)
    launched: list[list[int]] = []
    for places in found.values():
        most = max(1, _NUMBERS // _width(*sides[places[0]]))
        most = 1 << (most.bit_length() - 1)
        launched += [places[i : i + most] for i in range(0, len(places), most)]
    return launched


def _width(operator: TwoSided, side: int) -> int:
    return max(operator.groups, _LEAST) * operator.group_sizes[side]


@lru_cache(maxsize=2**12)  # a memo of a pure function: a bit per coordinate
def _tables(sides: tuple[OneSide, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the packed signs of some sides, and their rows of the Hadamard matrix."""
    signs, orders = zip(*(_table(*side) for side in sides), strict=True)
    return torch.stack(signs).to(device), torch.stack(orders).to(device)


def _table(operator: TwoSided, side: int) -> tuple[Tensor, Tensor]:
    length = operator.sides[side - 2]
    bits = operator.side_signs(side).words(0, length).to(torch.int64) & 1
    bits = torch.nn.functional.pad(bits, (0, -length % _BITS)).view(-1, _BITS)
    packed = (bits << torch.arange(_BITS)).sum(1)
    order = torch.zeros(operator.groups, dtype=torch.int32)
    order[: operator.kept] = operator.group_order(side)
    return packed.to(torch.uint32).view(torch.int32), order
