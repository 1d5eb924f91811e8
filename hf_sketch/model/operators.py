"""The operators of a map's parameters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from hf_sketch.sketches import Sketch
from hf_sketch.sketches.by_name import choose_factored, choose_operator

_OWN_SIZE = 2**16
_PACKED = "packed parameters"


@dataclass(frozen=True)
class Operators:
    """The operators of a map's parameters, made as they are first asked for.

    Args:
        shapes: shapes of each parameter, by name.
        group_of: group of each.
        out_size: numbers of each operator's sketch.
        layout: see `ModelSketch`, as for the rest.
        seed: seed of all.
        operator: name of those that the layout leaves.
    """

    shapes: Mapping[str, tuple[int, ...]]
    group_of: Mapping[str, str]
    out_size: int
    layout: str
    seed: int
    operator: str

    @cached_property
    def own(self) -> dict[str, Sketch]:
        """The operator of each parameter that has one of its own, by name."""
        own = {name: self._own_operator(name, x) for name, x in self.shapes.items()}
        return {name: sketch for name, sketch in own.items() if sketch is not None}

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each other parameter lies among its group's, laid end to end."""
        places: dict[str, slice] = {}
        ends: dict[str, int] = {}
        for name, shape in self.shapes.items():
            if name not in self.own:
                group = self.group_of[name]
                start = ends.get(group, 0)
                ends[group] = start + math.prod(shape)
                places[name] = slice(start, ends[group])
        return places

    @cached_property
    def packed(self) -> dict[str, Sketch]:
        """The operator of the parameters of each group that are laid end to end."""
        sizes = {self.group_of[name]: at.stop for name, at in self.places.items()}
        return {
            group: self._plain(size, f"{_PACKED} of {group}" if group else _PACKED)
            for group, size in sizes.items()
        }

    def _own_operator(self, name: str, shape: tuple[int, ...]) -> Sketch | None:
        """The operator of one parameter, or None if it shares one."""
        size = math.prod(shape)
        if self.layout == "flat":
            return None
        factored = choose_factored(self.layout, shape, self.out_size, self.seed, name)
        if factored is None and size >= _OWN_SIZE:
            return self._plain(size, name)
        return factored

    def _plain(self, size: int, stream: str) -> Sketch:
        sizes = (size, self.out_size, self.seed)
        return choose_operator(self.operator, *sizes, stream, self.layout == "flat")
