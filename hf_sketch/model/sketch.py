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
from hf_sketch.model.names import named_parameters
from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.zero import whole_shape
from hf_sketch.sketches import Sketch
from hf_sketch.sketches.by_name import OPERATORS, choose_factored, choose_operator
from hf_sketch.sketches.choices import check_choice

LAYOUTS = ("blocked", "factored", "flat", "grouped")
_OWN_SIZE = 2**16
_PROBED_ELEMENTS = 2**12


@dataclass(frozen=True)
class ModelSketch:
    """A sketch of a model's whole gradient: the sum of one sketch per parameter.

    Parameters have independent operators, drawn from (seed, parameter name), whose
    results add up in the same R^out_size; parameters of fewer than 2**16 elements are
    laid end to end and share one operator. Nothing of the model's size is ever built.
    Because the map is linear, gradients of parts (tied uses, micro-batches, shards) may
    be sketched apart and summed.

    Shapes:
        sketch   mapping of name to gradient -> (out_size,)
        adjoint  (out_size,) -> mapping of name to tensor of the parameter's shape

    Args:
        shapes: (name, shape) of every parameter that is sketched; see `from_model`.
        out_size: length of the sketch, in [1, number of elements].
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

    Raises:
        ValueError: no parameters, `out_size` out of range, an unknown layout or
            operator, or a normalizer of other parameters.

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

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError(
                "a sketch needs at least one trainable parameter, got none: "
                "call requires_grad_(True) on those that train."
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

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        out_size: int,
        layout: str = "blocked",
        seed: int = 0,
        operator: str = "srht",
        normalizer: Normalizer | None = None,
    ) -> "ModelSketch":
        """The sketch of all trainable parameters of `model`.

        Tied parameters count once, under their first name; the name prefixes that
        distributed and compiled wrappers add are dropped.
        """
        shapes: list[tuple[str, tuple[int, ...]]] = []
        frozen: list[str] = []
        for name, parameter in named_parameters(model).items():
            if parameter.requires_grad:
                shapes.append((name, whole_shape(parameter)))
            else:
                frozen.append(name)
        fields = tuple(shapes), out_size, layout, seed, operator, tuple(frozen)
        return cls(*fields, normalizer)

    @property
    def in_size(self) -> int:
        """Number of elements that are sketched."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def operators(self) -> dict[str, Sketch]:
        """The operator of each parameter that has one of its own, by name."""
        own = {name: self._own_operator(name, shape) for name, shape in self.shapes}
        return {name: sketch for name, sketch in own.items() if sketch is not None}

    @cached_property
    def packed(self) -> dict[str, slice]:
        """Where each other parameter lies in the vector of those laid end to end."""
        places: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes:
            if name not in self.operators:
                places[name] = slice(start, start + math.prod(shape))
                start = places[name].stop
        return places

    @cached_property
    def packed_operator(self) -> Sketch:
        """The operator of the parameters laid end to end."""
        size = max(place.stop for place in self.packed.values())
        return self._plain_operator(size, "packed parameters")

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
        return self.sketch_rows(rows).squeeze(0) if rows else torch.zeros(self.out_size)

    def sketch_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Sketch a batch of gradients, or of parts of them.

        Shapes:
            rows name -> (b, number of the parameter's elements), at least one name
            returns (b, out_size)
        """
        total = self.sketch_sum()
        for name, part in rows.items():
            total.add(name, part)
        return total.result()

    def sketch_parts(self, parts: Mapping[str, tuple[Tensor, int]]) -> Tensor:
        """Sketch a gradient of which there are some coordinates, zeros elsewhere.

        Args:
            parts: by name of the parameter, coordinates that lie one after the other in
                its elements row by row, (length,), and where they start.

        Returns:
            (out_size,)
        """
        held = {name: part for name, part in parts.items() if len(part[0])}
        if not held:
            return torch.zeros(self.out_size)
        total = self.sketch_sum()
        for name, (part, start) in held.items():
            total.add_part(name, part.detach().unsqueeze(0), start)
        return total.result().squeeze(0)

    def sketch_sum(self, total: Tensor | None = None) -> Accumulator:
        """Return an empty sum of sketches, for gradients that come part by part.

        Args:
            total: (b, out_size), where to add up the rows of a batch's examples; by
                default whole gradients are added up.
        """
        return Accumulator(
            dict(self.shapes),
            self.operators,
            self.packed,
            self.packed_operator if self.packed else None,
            self.layout == "flat",
            total,
            self.normalizer,
        )

    def adjoint(self, vector: Tensor) -> dict[str, Tensor]:
        """The transpose: a vector of R^out_size lifted to every parameter."""
        return dict(self.adjoint_parts(vector))

    def adjoint_parts(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """`adjoint`, one parameter after the other, by name."""
        packed = self.packed_operator.T @ vector if self.packed else vector
        for name, shape in self.shapes:
            if name in self.packed:
                lifted = packed[self.packed[name]]
            else:
                lifted = self.operators[name].T @ vector
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
        trainable = {
            n: p for n, p in named_parameters(model).items() if p.requires_grad
        }
        theirs = {name: whole_shape(p) for name, p in trainable.items()}
        ours = dict(self.shapes)
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the sketch has {name!r} with shape {ours.get(name)}, the model "
                    f"has {theirs.get(name)} there: pass the model that the sketch was "
                    "made for, with the same parameters trainable."
                )
        return trainable

    def check_value(self) -> list[float]:
        """The sketch of a fixed probe, which tells equal maps from others.

        The probe is cos(0), cos(1), ... on the first elements of the first, the last,
        the largest and the smallest parameter, and zero elsewhere.
        """
        return list(self._check_value)

    @cached_property
    def _check_value(self) -> tuple[float, ...]:
        by_size = sorted(self.shapes, key=lambda item: math.prod(item[1]))
        probed = {self.shapes[0], self.shapes[-1], by_size[0], by_size[-1]}
        probe = {
            name: (torch.arange(min(math.prod(shape), _PROBED_ELEMENTS)).cos(), 0)
            for name, shape in sorted(probed)
        }
        return tuple(self.sketch_parts(probe)[:16].tolist())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, with a description of the normalizer."""
        fields = dataclasses.asdict(dataclasses.replace(self, normalizer=None))
        fields["normalizer"] = self.normalizer and self.normalizer.to_dict()
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
        changed["normalizer"] = normalizer
        return cls(**{**fields, **changed})

    def _own_operator(self, name: str, shape: tuple[int, ...]) -> Sketch | None:
        """The operator of one parameter, or None if it shares one."""
        size = math.prod(shape)
        if self.layout == "flat":
            return None
        factored = choose_factored(self.layout, shape, self.out_size, self.seed, name)
        if factored is None and size >= _OWN_SIZE:
            return self._plain_operator(size, name)
        return factored

    def _plain_operator(self, size: int, stream: str) -> Sketch:
        sizes = (size, self.out_size, self.seed)
        return choose_operator(self.operator, *sizes, stream, self.layout == "flat")
