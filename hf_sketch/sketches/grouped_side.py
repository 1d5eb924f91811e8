"""One side of outer products, on its way to a grouped sketch."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.transforms.folding import add_up, folding_signs
from hf_sketch.sketches.transforms.hadamard import hadamard_matrix
from hf_sketch.sketches.two_sided.turning import TwoSided


@dataclass(frozen=True, eq=False)
class GroupedSide:
    """How `Grouped` folds and rotates one side: what was drawn for it, on a device.

    Args:
        signs: (experts or 1, length of the side).
        rows: (groups, c), the groups' rows of the Hadamard matrix.
        size: numbers in a group.
    """

    signs: Tensor
    rows: Tensor
    size: int

    @classmethod
    def drawn(cls, of: TwoSided, side: int, places: int) -> "GroupedSide":
        """Return a side of an operator, on the CPU.

        Args:
            of: the operator.
            side: which side.
            places: how many places it is folded to.
        """
        experts, size = math.prod(of.sides[:-2]), of.group_sizes[side]
        signs = folding_signs(experts * of.sides[side - 2], of.side_signs(side))
        rows = hadamard_matrix(of.groups)[of.group_order(side), : places // size]
        return cls(signs.view(experts, -1), rows, size)

    def to(self, device: torch.device, dtype: torch.dtype) -> "GroupedSide":
        """Return the same elsewhere."""
        signs, rows = (x.to(device, dtype) for x in (self.signs, self.rows))
        return replace(self, signs=signs, rows=rows)

    @cached_property
    def places(self) -> int:
        """How many places the side is folded to."""
        return self.rows.shape[1] * self.size

    @cached_property
    def longest(self) -> int:
        """The most numbers that one vector takes on its way."""
        return max(self.rows.shape) * self.size

    def of(self, expert: int) -> "GroupedSide":
        """Return the same for an expert's matrix alone."""
        return replace(self, signs=self.signs[expert : expert + 1])

    def fold(self, side: Side) -> Tensor:
        """Fold the last dimension: (b, t, length) -> (b, t, places)."""
        x = side.numbers
        if side.folded:
            return x.to(self.signs)
        signs = self._signs_of(side)
        if not x.is_floating_point():  # one-hot vectors, without scattering
            sign = torch.nn.functional.embedding(x, signs.unsqueeze(1))
            places = torch.arange(self.places, device=x.device)
            return ((x % len(places)).unsqueeze(-1) == places) * sign
        folded = add_up(x.to(signs), signs, self.places)
        missing = self.places - folded.shape[-1]  # without any, `pad` copies, too
        return torch.nn.functional.pad(folded, (0, missing)) if missing else folded

    def turn(self, folded: Tensor) -> Tensor:
        """Rotate: (b, t, places) -> (b * groups, t, size)."""
        tokens = folded.shape[1]
        places = folded.unflatten(2, (-1, self.size)).transpose(1, 2).flatten(2)
        return torch.matmul(self.rows, places).view(-1, tokens, self.size)

    def turn_in(self, side: Side, laid: Tensor, space: Tensor) -> Tensor:
        """Fold and rotate in memory that is there, of `longest` numbers per vector.

        Args:
            side: the side.
            laid: overwritten.
            space: where the result lies.

        Returns:
            (b * groups, t, size)
        """
        examples, tokens = side.numbers.shape[:2]
        groups, columns = self.rows.shape
        length = tokens * self.size
        laid = laid[: examples * columns * length].view(examples, columns, length)
        self._lay(side, laid, space)
        turned = space[: examples * groups * length].view(examples, groups, length)
        torch.bmm(self.rows.expand(examples, -1, -1), laid, out=turned)
        return turned.view(-1, tokens, self.size)

    def _lay(self, side: Side, laid: Tensor, space: Tensor) -> None:
        """Fold into `laid` (b, c, t * size)."""
        x, size = side.numbers, self.size
        examples, tokens = x.shape[:2]
        if not x.is_floating_point():
            place = x % self.places
            token = torch.arange(tokens, device=x.device)
            start = (place // size * tokens + token) * size
            one_hot = laid.zero_().flatten(1)
            one_hot.scatter_(1, start + place % size, self._signs_of(side)[x])
            return
        by_token = laid.view(examples, -1, tokens, size).transpose(1, 2)
        shape = by_token.shape
        if side.folded:
            by_token.copy_(x.view(shape))
            return
        x, signs = x.to(self.signs.dtype), self._signs_of(side)
        if x.shape[2] == self.places:
            signs = signs.unflatten(-1, (-1, size))
            torch.mul(x.reshape(shape), signs, out=by_token)
            return
        folded = space[: laid.numel()].view(examples, tokens, self.places)
        add_up(x, signs, self.places, out=folded[..., : x.shape[2]])
        folded[..., x.shape[2] :].zero_()
        by_token.copy_(folded.view(shape))

    def _signs_of(self, side: Side) -> Tensor:
        """The side's signs, with its scale: (length,), or of each vector."""
        signs = self.signs
        if side.scale is not None:
            signs = signs * side.scale.view(-1, signs.shape[1])
        return signs[0] if side.expert is None else signs[side.expert]
