"""One sketching operator over all trainable parameters of a model."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.coverage import Coverage
from hf_sketch.model.gradient_pass import WholeGradients
from hf_sketch.model.group_sum import GroupSum
from hf_sketch.model.groups import Grouping, LayerGroups, grouped_names
from hf_sketch.model.names import WHAT_TRAINS, named_parameters, trainable_parameters
from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.operators import Operators
from hf_sketch.model.probe import probe_of
from hf_sketch.model.zero import whole_shape
from hf_sketch.sketches import Sketch
from hf_sketch.sketches.by_name import OPERATORS
from hf_sketch.sketches.choices import check_choice, check_setting

LAYOUTS = ("blocked", "factored", "flat", "grouped")


@dataclass(frozen=True)
class ModelSketch:
    """A sketch of a model's whole gradient: the sum of one sketch per parameter.

    Parameters have independent operators, drawn from (seed, parameter name), whose
    results add up in the same R^out_size; parameters of fewer than 2**16 elements are
    laid end to end and share one operator. Nothing of the model's size is ever built.
    Because the map is linear, gradients of parts (tied uses, micro-batches, shards) may
    be sketched apart and summed.

    With groups of layers, only parameters of one group add up; the sketches of the
    groups lie end to end in one of `row_size` numbers, which is out_size without them.

    Shapes:
        sketch   mapping of name to gradient -> (row_size,)
        adjoint  (row_size,) -> mapping of name to tensor of the parameter's shape

    Args:
        shapes: (name, shape) of every parameter that is sketched; see `from_model`.
        out_size: length of the sketch, or of each group's, in [1, number of elements].
        layout: "blocked" sketches each parameter by `operator`, in blocks where it has
            them (2**16 elements, SRHT 2**10); "grouped" sketches each matrix, and each
            of a mixture's experts, by `Grouped`, which takes outputs and inputs apart,
            so that a per-example gradient is never formed, and all else (vectors, and
            matrices with a side shorter than about sqrt(out_size)) as "blocked";
            "factored", of earlier releases, takes matrices alone, with larger errors;
            "flat" is the paper's: one operator for all, without blocks.
        seed: the only source of randomness; equal fields, equal map.
        operator: "srht", "affd", "afjl" or "fjl" (in blocks), "dense", "ffd" or "qk".
        frozen: names of the parameters left out, for `coverage`.
        normalizer: scales each gradient before it is sketched; see `Normalizer`.
        groups: name of each parameter's group, in the order of `shapes`; none if all
            parameters add up.

    Raises:
        ValueError: no parameters, `out_size` out of range, an unknown layout or
            operator, or a normalizer or groups of other parameters.

    Reference:
        Schioppa 2024, arXiv:2402.03994, B.4 (sums of sketches of parts), eq. (6), (8).
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    out_size: int
    layout: str = "blocked"
    seed: int = 0
    operator: str = "srht"
    frozen: tuple[str, ...] = field(default=(), compare=False, repr=False)
    normalizer: Normalizer | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError(
                "a sketch needs at least one trainable parameter, got none: "
                + WHAT_TRAINS
            )
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("operator", self.operator, OPERATORS)
        elements = self.in_size
        if not 1 <= self.out_size <= elements:
            raise ValueError(
                f"out_size must be in [1, {elements}], the model's number of trainable"
                f" elements, got {self.out_size}: pass an out_size in that range."
            )
        if self.normalizer is not None:
            self.normalizer.check(dict(self.shapes))
        named = len(self.groups) in (0, len(self.shapes))
        check_setting("groups", named, "empty or a name per parameter", self.groups)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        out_size: int,
        layout: str = "blocked",
        seed: int = 0,
        operator: str = "srht",
        normalizer: Normalizer | None = None,
        groups: Grouping = 1,
    ) -> "ModelSketch":
        """The sketch of all trainable parameters of `model`.

        Tied parameters count once, under their first name; the name prefixes that
        distributed and compiled wrappers add are dropped. `groups` is the number of
        groups of layers, or a pattern for each; see `GradientSketchCallback`.
        """
        shapes: list[tuple[str, tuple[int, ...]]] = []
        frozen: list[str] = []
        for name, parameter in named_parameters(model).items():
            if parameter.requires_grad:
                shapes.append((name, whole_shape(parameter)))
            else:
                frozen.append(name)
        of = grouped_names(shapes, groups)
        fields = tuple(shapes), out_size, layout, seed, operator, tuple(frozen)
        return cls(*fields, normalizer, of)

    @property
    def in_size(self) -> int:
        """Number of elements that are sketched."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def row_size(self) -> int:
        """Numbers in a row: out_size for each group."""
        return math.prod(self.layer_groups.shape)

    @cached_property
    def layer_groups(self) -> LayerGroups:
        """Which group each parameter is in, and where its numbers lie in a row."""
        groups = self.groups or ("",) * len(self.shapes)
        names = (name for name, _ in self.shapes)
        return LayerGroups(dict(zip(names, groups, strict=True)), self.out_size)

    @property
    def operators(self) -> dict[str, Sketch]:
        """The operator of each parameter that has one of its own, by name."""
        return self._operators.own

    @property
    def packed(self) -> dict[str, slice]:
        """Where each other parameter lies among its group's, laid end to end."""
        return self._operators.places

    @property
    def packed_operators(self) -> dict[str, Sketch]:
        """The operator of each group's parameters that are laid end to end."""
        return self._operators.packed

    def sketch(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Sketch a gradient, or a part of one: parameters not given count as zero.

        Raises:
            ValueError: a name is unknown, or a gradient has another shape.
        """
        shapes = dict(self.shapes)
        rows: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            if shapes.get(name) != tuple(gradient.shape):
                raise ValueError(
                    f"the sketch holds {name!r} with shape {shapes.get(name)}, got "
                    f"{tuple(gradient.shape)}: build it with ModelSketch.from_model on "
                    "the model whose gradient this is."
                )
            rows[name] = gradient.detach().reshape(1, -1)
        if (found := self.whole_gradients.sketch(gradients)) is not None:
            return found
        return self.sketch_rows(rows).squeeze(0) if rows else torch.zeros(self.row_size)

    @cached_property
    def whole_gradients(self) -> WholeGradients:
        """What sketches gradients by kernels for all tensors at once, where it can."""
        return WholeGradients(self._operators, self.normalizer)

    def sketch_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Sketch a batch of gradients, or of parts of them.

        Shapes:
            rows name -> (b, number of the parameter's elements), at least one name
            returns (b, row_size)
        """
        total = self.sketch_sum()
        for name, part in rows.items():
            total.add(name, part)
        return total.result()

    def sketch_parts(self, parts: Mapping[str, tuple[Tensor, int]]) -> Tensor:
        """Sketch a gradient of which there are some coordinates, zeros elsewhere.

        Args:
            parts: for each parameter name, coordinates that lie one after the other in
                its elements row by row, (length,), and where they start.

        Returns:
            (row_size,)
        """
        held = {name: part for name, part in parts.items() if len(part[0])}
        if not held:
            return torch.zeros(self.row_size)
        total = self.sketch_sum()
        for name, (part, start) in held.items():
            total.add_part(name, part.detach().unsqueeze(0), start)
        return total.result().squeeze(0)

    def sketch_sum(self, like: Tensor | None = None) -> Accumulator:
        """Return an empty sum of sketches, for gradients that come part by part.

        Args:
            like: (b, ...), whose first dimension, dtype and device the rows of a
                batch's examples have; by default whole gradients are added up.
        """
        sums = {
            group: self.group_sum(group, like) for group in self.layer_groups.columns
        }
        return Accumulator(self.layer_groups.of, sums)

    def group_sum(self, group: str, like: Tensor | None = None) -> GroupSum:
        """Return the part of such a sum that is one group's."""
        total = None if like is None else like.new_zeros(len(like), self.out_size)
        return GroupSum(self._operators, group, total, self.normalizer)

    def adjoint(self, vector: Tensor) -> dict[str, Tensor]:
        """The transpose: a vector of R^row_size lifted to every parameter."""
        found = self.whole_gradients.lift(vector)
        return dict(self.adjoint_parts(vector)) if found is None else found

    def adjoint_parts(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """`adjoint`, one parameter after the other, by name."""
        parts = {group: vector[at] for group, at in self.layer_groups.columns.items()}
        packed = {g: of.T @ parts[g] for g, of in self.packed_operators.items()}
        for name, shape in self.shapes:
            group = self.layer_groups.of[name]
            if name in self.packed:
                lifted = packed[group][self.packed[name]]
            else:
                lifted = self.operators[name].T @ parts[group]
            if self.normalizer is not None:
                lifted = lifted * self.normalizer.elements(name, 0, len(lifted), lifted)
            yield name, lifted.view(shape)

    def coverage(self) -> Coverage:
        """Which parameters are sketched, how many elements, and what is left out."""
        names = tuple(name for name, _ in self.shapes)
        return Coverage(names, self.in_size, self.frozen)

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The sketched parameters of `model`, by name.

        Raises:
            ValueError: the model's trainable parameters are not those of the sketch.
        """
        return trainable_parameters(model, dict(self.shapes))

    def check_value(self) -> list[float]:
        """The sketch of a fixed probe, which identifies the map."""
        return list(self._check_value)

    @cached_property
    def _check_value(self) -> tuple[float, ...]:
        return tuple(self.sketch_parts(probe_of(self.shapes))[:16].tolist())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, with a description of the normalizer."""
        fields = dataclasses.asdict(dataclasses.replace(self, normalizer=None))
        fields["normalizer"] = self.normalizer and self.normalizer.to_dict()
        fields["groups"] = self.groups or None
        return {name: x for name, x in fields.items() if x is not None}

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], normalizer: Normalizer | None = None
    ) -> "ModelSketch":
        """Rebuild from `to_dict`, also after a trip through JSON."""
        described = fields.get("normalizer")
        if described != (normalizer and normalizer.to_dict()):
            raise ValueError(
                f"the sketch was made with the normalizer {described}, got "
                f"{normalizer and normalizer.to_dict()}: pass the store's own."
            )
        shapes = tuple((name, tuple(shape)) for name, shape in fields["shapes"])
        changed: dict[str, Any] = {"shapes": shapes, "frozen": tuple(fields["frozen"])}
        changed |= {"normalizer": normalizer, "groups": tuple(fields.get("groups", ()))}
        return cls(**{**fields, **changed})

    @cached_property
    def _operators(self) -> Operators:
        settings = self.out_size, self.layout, self.seed, self.operator
        return Operators(dict(self.shapes), self.layer_groups.of, *settings)
