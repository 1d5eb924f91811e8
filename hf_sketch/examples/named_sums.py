"""Sketches of a few examples' gradients, parameter by parameter."""

import math

from torch import Tensor

from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.group_sum import GroupSum
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.outer import Routed, Side, form_outer
from hf_sketch.sketches.pieces import WorkingMemory


class NamedSums:
    """Adds up gradients as `Accumulator` does, each parameter's apart.

    Parameters that share an operator have their gradients kept as they are.

    Args:
        model_sketch: gives the operators.
        like: (examples, ...), whose dtype and device the sums have.
    """

    def __init__(self, model_sketch: ModelSketch, like: Tensor) -> None:
        self.names: set[str] = set()
        self._model_sketch = model_sketch
        self._shapes = dict(model_sketch.shapes)
        self._like = like
        self._memory = WorkingMemory()
        self._sketched: dict[str, GroupSum] = {}
        self._plain: dict[str, Tensor] = {}

    def empty(self) -> "NamedSums":
        """Return empty sums for the same number of examples."""
        return NamedSums(self._model_sketch, self._like)

    def fold(self, name: str, factor: Tensor, side: int) -> Tensor | Side:
        """See `Accumulator.fold`."""
        if name not in self._model_sketch.operators:
            return factor
        return self._sum(name).fold(name, factor, side)

    def add(self, name: str, rows: Tensor) -> None:
        """See `Accumulator.add`."""
        self.names.add(name)
        if name in self._model_sketch.operators:
            self._sum(name).add(name, rows)
        else:
            self._hold(name)[:] += rows

    def add_part(self, name: str, part: Tensor, start: int) -> None:
        """See `Accumulator.add_part`."""
        self.names.add(name)
        if name in self._model_sketch.operators:
            self._sum(name).add_part(name, part, start)
        else:
            self._hold(name)[:, start : start + part.shape[1]] += part

    def add_outer(self, name: str, left: Tensor | Side, right: Tensor | Side) -> None:
        """See `Accumulator.add_outer`."""
        self.names.add(name)
        if name in self._model_sketch.operators:
            self._sum(name).add_outer(name, left, right)
            return
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        if left.is_floating_point():
            left = left.to(self._like)
        size = math.prod(self._shapes[name])
        self._hold(name)[:] += form_outer(left, right.to(self._like), 0, size)

    def add_routed(self, name: str, left: Tensor, right: Routed) -> None:
        """See `Accumulator.add_routed`."""
        self.names.add(name)
        if name in self._model_sketch.operators:
            self._sum(name).add_routed(name, left, right)
            return
        right = right.of(right.sides.to(self._like))
        for start, rows in right.formed(left.to(self._like)):
            self.add_part(name, rows, start)

    def add_example(self, name: str, index: int, gradient: Tensor) -> None:
        """See `Accumulator.add_example`."""
        self.names.add(name)
        if name in self._model_sketch.operators:
            self._sum(name).add_example(name, index, gradient)
        else:
            self._hold(name)[index] += gradient.reshape(-1)

    def of(self, name: str) -> Tensor:
        """Return the examples' sums of a parameter: (examples, numbers)."""
        if name in self._model_sketch.operators:
            found = self._sum(name).result()
            assert found is not None
            return found
        return self._hold(name)

    def _sum(self, name: str) -> GroupSum:
        if name not in self._sketched:
            group = self._model_sketch.layer_groups.of[name]
            self._sketched[name] = self._model_sketch.group_sum(group, self._like)
            self._sketched[name].memory = self._memory
        return self._sketched[name]

    def _hold(self, name: str) -> Tensor:
        if name not in self._plain:
            size = math.prod(self._shapes[name])
            self._plain[name] = self._like.new_zeros(len(self._like), size)
        return self._plain[name]


Sums = Accumulator | NamedSums
