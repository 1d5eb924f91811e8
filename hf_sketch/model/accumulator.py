"""The sketch of a gradient whose parts come one after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

from torch import Tensor

from hf_sketch.sketches import Sketch
from hf_sketch.sketches.blocked import BlockedSketch, WorkingMemory
from hf_sketch.sketches.operator import accumulation_dtype


@dataclass
class SketchSum:
    """Adds up the sketches of parameters' rows.

    Parameters that share an operator are held until the end, all others are given up as
    they come.

    Args:
        operators: of the parameters that have one of their own.
        packed: where each other parameter lies in the vector of those laid end to end.
        packed_operator: of that vector; None if there is none.
        whole: the packed operator has one block, for all of the vector.
    """

    operators: Mapping[str, Sketch]
    packed: Mapping[str, slice]
    packed_operator: Sketch | None
    whole: bool = False
    _mixed: dict[int, tuple[BlockedSketch, Tensor]] = field(default_factory=dict)
    _parts: list[Tensor] = field(default_factory=list)
    _small: dict[str, Tensor] = field(default_factory=dict)
    _memory: WorkingMemory = field(default_factory=WorkingMemory)

    def add(self, name: str, rows: Tensor) -> None:
        """Add rows of one parameter: (b, elements of the parameter).

        Those of a parameter that shares an operator must stay as they are until
        `result`.
        """
        rows = rows.to(accumulation_dtype(rows.dtype))
        if name in self.operators:
            self._add(self.operators[name], rows)
        else:
            held = self._small.get(name)
            self._small[name] = rows if held is None else held + rows

    def add_part(self, name: str, part: Tensor, start: int) -> None:
        """Add some coordinates of a parameter's rows, those from `start` on.

        Of parameters that share an operator, rows of full length are built.

        Shapes:
            part (b, length)
        """
        part = part.to(accumulation_dtype(part.dtype))
        operator = self.operators.get(name)
        if operator is None:
            place = self.packed[name]
            rows = part.new_zeros(len(part), place.stop - place.start)
            rows[:, start : start + part.shape[1]] = part
            self.add(name, rows)
        elif isinstance(operator, BlockedSketch):
            self._collect(operator, operator.accumulate_part(part, start, self._memory))
        else:
            self._join(operator.apply_part(part, start))

    def result(self) -> Tensor:
        """The sketch of all rows: (b, out_size). At least one must have been added."""
        if self._small:
            assert self.packed_operator is not None
            like = next(iter(self._small.values()))
            length = self._packed_length(self.packed_operator)
            packed = like.new_zeros(len(like), length)
            for name, rows in self._small.items():
                packed[:, self.packed[name]] = rows
            self._small = {}
            self._add(self.packed_operator, packed)
        return reduce(Tensor.add_, self._finished())

    def _add(self, operator: Sketch, rows: Tensor) -> None:
        """Apply an operator; those in blocks of one size are finished together."""
        if not isinstance(operator, BlockedSketch):
            self._join(operator.apply_rows(rows))
        elif self.whole:
            self._parts.append(operator.finish(operator.accumulate_whole(rows)))
        else:
            self._collect(operator, operator.accumulate(rows, memory=self._memory))

    def _join(self, part: Tensor) -> None:
        """Keep one sum of the parts that are finished."""
        self._parts.append(part)
        if len(self._parts) > 1:
            self._parts[0] += self._parts.pop()

    def _collect(self, operator: BlockedSketch, mixed: Tensor) -> None:
        """Keep a sum over blocks, to be finished with those of the same size."""
        if operator.block in self._mixed:
            mixed += self._mixed[operator.block][1]
        self._mixed[operator.block] = operator, mixed

    def _finished(self) -> Iterator[Tensor]:
        yield from self._parts
        for operator, mixed in self._mixed.values():
            yield operator.finish(mixed)

    def _packed_length(self, operator: Sketch) -> int:
        """Room for the parameters laid end to end; an operator's whole block."""
        if self.whole and isinstance(operator, BlockedSketch):
            return operator.block
        return operator.shape[1]
