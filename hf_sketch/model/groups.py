"""Groups of layers: which parameters each has, and where its numbers lie in a row."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from hf_sketch.sketches.choices import check_count, check_number, check_setting

Grouping = int | Mapping[str, str | None]
Layers = str | Collection[str] | Mapping[str, float]


@dataclass(frozen=True)
class LayerGroups:
    """Where the numbers of each group of layers lie in a row.

    Args:
        of: group of each parameter, by its name; "" of all where there are no groups.
        out_size: numbers of a group in a row.
    """

    of: Mapping[str, str]
    out_size: int

    @cached_property
    def columns(self) -> dict[str, slice]:
        """The numbers of each group, in the order of their first parameters."""
        size = self.out_size
        names = dict.fromkeys(self.of.values())
        return {name: slice(i * size, (i + 1) * size) for i, name in enumerate(names)}

    @property
    def count(self) -> int:
        """Number of groups, 1 without any."""
        return len(self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """A row's shape: (groups, out_size), or (out_size,) without groups."""
        return (self.out_size,) if "" in self.columns else (self.count, self.out_size)

    def weights(self, layers: Layers) -> Tensor:
        """Return the weight of each number in a row: (groups * out_size,).

        Args:
            layers: names of groups, which count in full; or weights by name. Other
                groups have the weight 0.

        Raises:
            ValueError: there are no groups, none of that name, or a weight is negative.
        """
        if "" in self.columns:
            raise ValueError(
                "layers needs rows with groups of layers, got rows of one sketch for "
                "all: record them with GradientSketchCallback(groups=...)."
            )
        layers = [layers] if isinstance(layers, str) else layers
        if not isinstance(layers, Mapping):
            layers = dict.fromkeys(layers, 1.0)
        unknown = [name for name in layers if name not in self.columns]
        if unknown or not layers:
            raise ValueError(
                f"layers must be some of {[*self.columns]}, got {unknown or layers!r}: "
                "pass names of these groups."
            )
        found = torch.zeros(self.count * self.out_size)
        for name, weight in layers.items():
            check_number(f"the weight of {name!r}", weight, 0)
            found[self.columns[name]] = weight
        return found


def check_grouping(groups: Grouping) -> None:
    """Raise unless `groups` is a number of groups, or has a pattern for each.

    Raises:
        ValueError: it is not, or a pattern is no regular expression.
    """
    if not isinstance(groups, Mapping):
        check_count("groups", groups)
        return
    check_setting("groups", bool(groups) and "" not in groups, "named", dict(groups))
    for name, pattern in groups.items():
        try:
            re.compile(pattern or "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"groups[{name!r}] must be a regular expression or None, got "
                f"{pattern!r} ({error}): escape what is meant literally."
            ) from error


def grouped_names(
    shapes: Sequence[tuple[str, tuple[int, ...]]], groups: Grouping
) -> tuple[str, ...]:
    """Return the group of each parameter; nothing for a single group.

    Args:
        shapes: name and shape of each parameter, in the model's order.
        groups: number of groups, runs of layers with about equally many elements. A
            layer is all up to the first number in a parameter's name
            ("encoder.layer.3"), or the module that has the parameter. Or for each group
            a regular expression that is found in its parameters' names and in no
            others, and None for a group of all the rest.

    Raises:
        ValueError: there are fewer layers than groups, a parameter is in no group or in
            several, or a group has no parameter.
    """
    check_grouping(groups)
    sizes = {name: math.prod(shape) for name, shape in shapes}
    if isinstance(groups, Mapping):
        return _matching(list(sizes), groups)
    return () if groups == 1 else _runs(sizes, groups)


def _matching(
    names: Sequence[str], patterns: Mapping[str, str | None]
) -> tuple[str, ...]:
    """The one group whose pattern each name has."""
    rest = [group for group, pattern in patterns.items() if pattern is None]
    found: list[str] = []
    for name in names:
        having = [
            g for g, p in patterns.items() if p is not None and re.search(p, name)
        ]
        having = having or rest
        if len(having) != 1:
            raise ValueError(
                f"each parameter must be in one group, got {name!r} in "
                f"{having or 'none'}: change the patterns in groups, or give a group "
                "the pattern None for all the rest."
            )
        found += having
    if empty := [group for group in patterns if group not in found]:
        raise ValueError(
            f"each group must have a parameter that trains, got none for {empty}: "
            f"leave it out, or change its pattern. The first name is {names[0]!r}."
        )
    return tuple(found)


def _runs(sizes: Mapping[str, int], count: int) -> tuple[str, ...]:
    """Runs of layers, named by their first and their last one."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        layer = _layer_of(name)
        layers[layer] = layers.get(layer, 0) + size
    if count > len(layers):
        raise ValueError(
            f"groups must be at most {len(layers)}, the number of layers that train, "
            f"got {count}: pass fewer, or a pattern for each group."
        )
    names = list(layers)
    starts = _equal_runs(list(layers.values()), count)
    group_of: dict[str, str] = {}
    for start, stop in zip(starts, [*starts[1:], len(names)], strict=True):
        run = names[start:stop]
        name = run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}"
        group_of |= dict.fromkeys(run, name)
    return tuple(group_of[_layer_of(name)] for name in sizes)


def _layer_of(name: str) -> str:
    """The part of a parameter's name up to its first number, or its module's name."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1 if numbers else -1]) or name


def _equal_runs(sizes: Sequence[int], count: int) -> list[int]:
    """Where `count` runs begin whose sums have the least sum of squares."""
    ends = [0, *accumulate(sizes)]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by where the last run ends
    for run in range(1, count + 1):
        longer: dict[int, tuple[int, list[int]]] = {}
        for stop in range(run, len(sizes) - (count - run) + 1):
            costs = {
                start: cost + (ends[stop] - ends[start]) ** 2
                for start, (cost, _) in best.items()
                if start < stop
            }
            start = min(costs, key=costs.__getitem__)
            longer[stop] = costs[start], [*best[start][1], start]
        best = longer
    return best[len(sizes)][1]
