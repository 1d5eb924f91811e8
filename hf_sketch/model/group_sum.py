"""The sum of the sketches of one group's gradients."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.operators import Operators
from hf_sketch.sketches import QK, Grouped, Sketch
from hf_sketch.sketches.blocked import BlockedSketch, WorkingMemory
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import Routed, Side, form_outer
from hf_sketch.sketches.transforms.precision import exact


@dataclass
class GroupSum:
    """Adds up the sketches of the gradients of one group's parameters.

    A gradient comes as whole rows, as a range of coordinates, as a sum of outer
    products or for one example alone; uses of one parameter add up. It is sketched at
    once and dropped, unless its parameter shares an operator (fewer than 2**16
    elements): such rows are held until `result`, and must not change until then.

    Args:
        operators: operators of all parameters.
        group: name of the group.
        total: (b, out_size), sketches to add to, in place. With it, each part of a
            batch's gradients is finished as it comes, since sums over blocks are larger
            than rows. Without it, operators with blocks of one size finish together.
        normalizer: scales gradients before they are sketched.
        memory: to work in; several sums may share it.
    """

    operators: Operators
    group: str
    total: Tensor | None = None
    normalizer: Normalizer | None = None
    memory: WorkingMemory = field(default_factory=WorkingMemory)
    names: set[str] = field(default_factory=set[str])
    _held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _mixed: dict[int, tuple[BlockedSketch, Tensor]] = field(default_factory=dict)
    _by_example: bool = field(init=False)
    _packed: Sketch | None = field(init=False)

    def __post_init__(self) -> None:
        self._by_example = self.total is not None
        self._packed = self.operators.packed.get(self.group)

    @exact
    def add(self, name: str, rows: Tensor) -> None:
        """Add rows of a parameter: (b, elements)."""
        self.names.add(name)
        rows = self._scaled(name, self._converted(rows))
        operator = self.operators.own.get(name)
        if operator is None:
            self._hold(name, rows)
        elif self._by_example:
            self._join(operator.apply_rows(rows))
        else:
            self._apply(operator, rows)

    @exact
    def add_part(self, name: str, part: Tensor, start: int) -> None:
        """Add some coordinates of a parameter's rows, those from `start` on.

        Rows of full length are built for parameters that share an operator.

        Shapes:
            part (b, length)
        """
        self.names.add(name)
        part = self._scaled(name, self._converted(part), start)
        operator = self.operators.own.get(name)
        if operator is None:
            if name not in self._held or not self._by_example:
                size = math.prod(self.operators.shapes[name])
                self._hold(name, part.new_zeros(len(part), size))
            self._held[name][:, start : start + part.shape[1]] += part
        elif isinstance(operator, BlockedSketch):
            self._collect(operator, operator.accumulate_part(part, start, self.memory))
        else:
            self._join(operator.apply_part(part, start))

    @exact
    def fold(self, name: str, factor: Tensor, side: int) -> Tensor | Side:
        """Return what `add_outer` needs of one side, where that is less of it.

        Shapes:
            factor (b, t, elements of the side)
        """
        operator = self._two_sided(name)
        if operator is None:
            return factor
        factor = self._converted(factor)
        if self.normalizer is not None:
            factor = factor * self.normalizer.side(name, side, factor)
        return Side(operator.fold(factor, side), folded=True)

    @exact
    def add_outer(self, name: str, left: Tensor | Side, right: Tensor | Side) -> None:
        """Add sum_t left_t (x) right_t of each example; sides may come folded.

        Shapes:
            left (b, t, m), or integer (b, t) for one-hot vectors, right (b, t, n)
        """
        self.names.add(name)
        if (factored := self._two_sided(name)) is not None:
            sides = self._side(name, left, 0), self._side(name, right, 1)
            factored.add_outer_(self._rows, *sides, self.memory)
            return
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        left, right = self._converted(left), self._converted(right)
        size = math.prod(self.operators.shapes[name])
        if self.normalizer is not None:
            scaled = self.normalizer.scale_outer(name, left, right)
            if scaled is None:  # whose sides are not those of the moments
                self.add(name, form_outer(left, right, 0, size))
                return
            left, right = scaled
        operator = self.operators.own.get(name)
        if operator is not None:
            self._join(operator.apply_outer(left, right))
        else:
            self._hold(name, form_outer(left, right, 0, size))

    @exact
    def add_routed(self, name: str, left: Tensor, right: Routed) -> None:
        """Add sum_t left_t (x) right_t of each example, in the expert's matrix.

        Shapes:
            left (t, m), the tokens of all examples
        """
        self.names.add(name)
        operator = self.operators.own.get(name)
        if isinstance(operator, Grouped):
            left, sides, expert = right.by_example(left)
            first, second = (
                replace(self._side(name, x, side), expert=expert)
                for side, x in enumerate((left, sides))
            )
            operator.add_outer_(self._rows, first, second, self.memory)
            return
        left, right = self._converted(left), right.of(self._converted(right.sides))
        for start, rows in right.formed(left):
            self.add_part(name, rows, start)

    @exact
    def add_example(self, name: str, index: int, gradient: Tensor) -> None:
        """Add the gradient of one example, in the parameter's shape."""
        self.names.add(name)
        row = self._scaled(name, self._converted(gradient.reshape(1, -1)))
        operator = self.operators.own.get(name)
        if operator is not None:
            self._rows[index : index + 1] += operator.apply_rows(row)
            return
        if name not in self._held:
            self._held[name] = row.new_zeros(len(self._rows), row.shape[1])
        self._held[name][index : index + 1] += row

    @exact
    def result(self) -> Tensor | None:
        """Return the sketch of all that came, (b, out_size); None if nothing did."""
        if self._held:
            self._finish_held()
        for operator, mixed in self._mixed.values():
            self._join(operator.finish(mixed))
        self._mixed = {}
        return self.total

    def _finish_held(self) -> None:
        """Sketch the parameters that share an operator, laid end to end."""
        operator = self._packed
        assert operator is not None
        if self.operators.layout == "flat" and isinstance(operator, BlockedSketch):
            packed = self._end_to_end(operator.block)
            self._join(operator.finish(operator.accumulate_whole(packed)))
        else:
            self._apply(operator, self._end_to_end(operator.shape[1]))

    def _end_to_end(self, length: int) -> Tensor:
        """Return the held rows in their places, and let go of them."""
        places, end = self.operators.places, 0
        like = next(iter(self._held.values()))
        parts: list[Tensor] = []
        for name in sorted(self._held, key=lambda name: places[name].start):
            if places[name].start > end:
                parts.append(like.new_zeros(len(like), places[name].start - end))
            parts.append(self._held.pop(name))
            end = places[name].stop
        parts.append(like.new_zeros(len(like), length - end))
        return torch.cat(parts, 1)

    def _apply(self, operator: Sketch, rows: Tensor) -> None:
        """Apply an operator; those with blocks of one size finish together."""
        if isinstance(operator, BlockedSketch):
            self._collect(operator, operator.accumulate(rows, memory=self.memory))
        else:
            self._join(operator.apply_rows(rows))

    def _hold(self, name: str, rows: Tensor) -> None:
        """Keep rows of a parameter that shares an operator."""
        held = self._held.get(name)
        if held is None:
            self._held[name] = rows
        elif self._by_example:
            held += rows  # made by a gradient rule, for this sum alone
        else:
            self._held[name] = held + rows

    def _join(self, part: Tensor) -> None:
        """Add a finished sketch."""
        if self.total is None:
            self.total = part
        else:
            self.total += part

    def _collect(self, operator: BlockedSketch, mixed: Tensor) -> None:
        """Add a sum over blocks, to be finished with those of the same size."""
        if operator.block in self._mixed:
            mixed += self._mixed[operator.block][1]
        self._mixed[operator.block] = operator, mixed

    def _two_sided(self, name: str) -> QK | Grouped | None:
        """Return the operator if it folds the sides of an outer product apart."""
        operator = self.operators.own.get(name)
        matrix = len(self.operators.shapes[name]) == 2
        if isinstance(operator, QK) and operator.sides == self.operators.shapes[name]:
            return operator
        return operator if isinstance(operator, Grouped) and matrix else None

    def _side(self, name: str, x: Tensor | Side, side: int) -> Side:
        """Return a side of a parameter's outer products, with its scale."""
        if isinstance(x, Side) or self.normalizer is None:
            return x if isinstance(x, Side) else Side(x)
        return Side(x, scale=self.normalizer.side(name, side, self._rows))

    @property
    def _rows(self) -> Tensor:
        """The rows of a batch's examples."""
        assert self.total is not None
        return self.total

    def _scaled(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """Return rows, or their coordinates from `start` on, as they are sketched."""
        if self.normalizer is None:
            return rows
        return self.normalizer.scale(name, rows, start)

    def _converted(self, x: Tensor) -> Tensor:
        """Return numbers in the dtype that sums are kept in; integers as they are."""
        if not x.is_floating_point():
            return x
        given = self.total if self._by_example else None
        return x.to(accumulation_dtype(x.dtype) if given is None else given.dtype)
