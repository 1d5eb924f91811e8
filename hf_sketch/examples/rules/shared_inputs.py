"""Inputs that several linear layers take, read once on devices that have kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import Grouped
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.two_sided.turning import OneSide, can_turn, together, turn


class SharedInputs:
    """Finds calls of linear layers, one after the other, that take the same input.

    So do the queries, keys and values of attention. Where autograd keeps the input, it
    is folded for all of them when the first gradient arrives. Otherwise that is done at
    once, for those that took the same input in the batch before.

    Args:
        model_sketch: the map.
        dtype: dtype of the rows.
    """

    def __init__(self, model_sketch: ModelSketch, dtype: torch.dtype) -> None:
        self._operators = model_sketch.operators
        self._normalizer = model_sketch.normalizer
        self._names: dict[OneSide, str] = {}
        self._like = torch.empty(0, dtype=dtype)
        self._last: _Input | None = None
        # Sides that took the same input as another, right after it.
        self._followers: dict[OneSide, list[OneSide]] = {}

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        self._last = None

    def side(self, name: str, side: int, x: Tensor) -> OneSide | None:
        """Return the side of a weight that x is folded for; None without a kernel."""
        operator = self._operators.get(name)
        if not isinstance(operator, Grouped) or len(operator.sides) > 2:
            return None
        own: OneSide = operator, side
        if not can_turn(Side(x), own, self._like):
            return None
        self._names[own] = name
        return own

    @property
    def is_scaled(self) -> bool:
        """Whether sides are multiplied by factors before they are folded."""
        return self._normalizer is not None

    def _turn(self, x: Tensor, sides: Sequence[OneSide]) -> list[Tensor]:
        """Fold and rotate vectors for several sides, with their factors."""
        scales: list[Tensor] = []
        if self._normalizer is not None:
            if self._like.device != x.device:
                self._like = self._like.to(x.device)
            scales = [
                self._normalizer.side(self._names[own], own[1], self._like)
                for own in sides
            ]
        return turn(x, sides, scales)

    def take(
        self,
        name: str,
        side: int,
        x: Tensor,
        tokens: Callable[[Tensor], Tensor],
        kept: bool,
    ) -> "SharedSide | None":
        """Return the input of a weight, to be folded later; None without a kernel.

        Args:
            name: name of the weight.
            side: dimension of the weight along which inputs lie.
            x: the input.
            tokens: lays it out, (b, t, length).
            kept: whether autograd keeps it as it is.
        """
        if (own := self.side(name, side, x)) is None:
            return None
        last = self._last
        if last is None or not last.is_of(x, kept):
            sides = [own] if kept else [own, *self._followers.get(own, ())]
            last = self._last = _Input(x, tokens, kept, sides, self._turn)
        elif own not in last.sides:
            if not kept:
                self._followers.setdefault(last.sides[0], []).append(own)
                alone = _Input(x, tokens, kept, [own], self._turn)
                return SharedSide(alone, 0)
            last.sides.append(own)
        return SharedSide(last, last.sides.index(own))


class SharedSide:
    """The side of a weight's outer products that is its layer's input.

    Args:
        shared: the input.
        place: which of its sides.
    """

    def __init__(self, shared: "_Input", place: int) -> None:
        self._shared, self._place = shared, place

    def turned(self) -> Side:
        """Return it folded and rotated."""
        return Side(self._shared.turned(self._place), folded=True, turned=True)


class _Input:
    """An input, until it is folded for the sides that take it."""

    def __init__(
        self,
        x: Tensor,
        tokens: Callable[[Tensor], Tensor],
        kept: bool,
        sides: Sequence[OneSide],
        turn: Callable[[Tensor, Sequence[OneSide]], list[Tensor]],
    ) -> None:
        self._x: Tensor | None = x
        self._tokens, self._kept, self._version = tokens, kept, x._version
        self._turn_together = turn
        self.sides = [*sides]
        self._turned: list[Tensor] = []
        if not kept:
            self._turn(x)

    def is_of(self, x: Tensor, kept: bool) -> bool:
        """Return whether this is the same tensor, unchanged, which sides may join."""
        mine = self._x
        if mine is None or kept != self._kept or x._version != self._version:
            return False
        return (x.data_ptr(), x.dtype, x.shape, x.stride()) == (
            mine.data_ptr(),
            mine.dtype,
            mine.shape,
            mine.stride(),
        )

    def turned(self, place: int) -> Tensor:
        """Return what a side makes of it."""
        if self._x is not None and self._kept:
            self._turn(self._x)
            self._x = None
        return self._turned[place]

    def _turn(self, x: Tensor) -> None:
        x = self._tokens(x)
        found: dict[int, Tensor] = {}
        for places in together(self.sides):
            turned = self._turn_together(x, [self.sides[place] for place in places])
            found |= dict(zip(places, turned, strict=True))
        self._turned = [found[place] for place in range(len(self.sides))]
