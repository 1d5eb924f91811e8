"""Sketches of gradients that arrive parameter by parameter, added up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sketch.model.group_sum import GroupSum
from hf_sketch.sketches.outer import Routed, Side
from hf_sketch.sketches.pieces import WorkingMemory


class Accumulator:
    """Adds up the sketches of parameters' gradients as they arrive.

    Each group of layers has a sum of its own, which takes the gradients of its
    parameters; see `GroupSum`. Without groups there is one, of all parameters.

    Args:
        group_of: group of each parameter, by name.
        sums: sums of each group, in the order of their numbers in a row.
    """

    def __init__(
        self, group_of: Mapping[str, str], sums: Mapping[str, GroupSum]
    ) -> None:
        self._group_of, self._sums = group_of, sums
        memory = WorkingMemory()
        for part in sums.values():
            part.memory = memory

    @property
    def names(self) -> set[str]:
        """The parameters of which something came."""
        return set[str]().union(*(part.names for part in self._sums.values()))

    def add(self, name: str, rows: Tensor) -> None:
        """See `GroupSum.add`."""
        self._of(name).add(name, rows)

    def add_part(self, name: str, part: Tensor, start: int) -> None:
        """See `GroupSum.add_part`."""
        self._of(name).add_part(name, part, start)

    def fold(self, name: str, factor: Tensor, side: int) -> Tensor | Side:
        """See `GroupSum.fold`."""
        return self._of(name).fold(name, factor, side)

    def add_outer(self, name: str, left: Tensor | Side, right: Tensor | Side) -> None:
        """See `GroupSum.add_outer`."""
        self._of(name).add_outer(name, left, right)

    def add_routed(self, name: str, left: Tensor, right: Routed) -> None:
        """See `GroupSum.add_routed`."""
        self._of(name).add_routed(name, left, right)

    def add_example(self, name: str, index: int, gradient: Tensor) -> None:
        """See `GroupSum.add_example`."""
        self._of(name).add_example(name, index, gradient)

    def result(self) -> Tensor:
        """Return the sketch of all that came: (b, row_size), at least one part."""
        found = [part.result() for part in self._sums.values()]
        like = next(part for part in found if part is not None)
        parts = [torch.zeros_like(like) if part is None else part for part in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _of(self, name: str) -> GroupSum:
        return self._sums[self._group_of[name]]
