"""Whole gradients, sketched and lifted by kernels for all tensors at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.operators import Operators
from hf_sketch.sketches import Grouped, Sketch
from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.multi_tensor.blocks import BlockedTensor, adds_blocks
from hf_sketch.sketches.multi_tensor.division import CHUNK, GradientTensors
from hf_sketch.sketches.multi_tensor.gradient_pass import GradientPass
from hf_sketch.sketches.multi_tensor.lift import Lift
from hf_sketch.sketches.multi_tensor.matrices import GroupedTensor, folds_matrices
from hf_sketch.sketches.transforms.devices import can_launch


class WholeGradients:
    """Sketches and lifts whole gradients at once, where there are kernels for them.

    What that needs is kept, for each device.

    Args:
        operators: operators of the parameters.
        normalizer: scales gradients before they are sketched. Vectors are then lifted
            by no kernel.
    """

    def __init__(self, operators: Operators, normalizer: Normalizer | None) -> None:
        self._operators, self._normalizer = operators, normalizer
        self._kept: dict[torch.device, GradientPass] = {}
        self._lifts: dict[torch.device, Lift] = {}

    def sketch(self, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """Return the sketch of a gradient, or None if it must be read part by part.

        Args:
            gradients: gradients by name; parameters not given count as zero.
        """
        device = next((x.device for x in gradients.values()), None)
        if device is None or not self.can_read(device):
            return None
        given = [gradients.get(name) for name in self._operators.shapes]
        if device not in self._kept:
            self._kept[device] = self.begin(device)
        kept = self._kept[device]
        return kept.sketch(given) if kept.takes(given) else None

    def lift(self, vector: Tensor) -> dict[str, Tensor] | None:
        """Return what the transpose makes of a vector, or None if no kernel does.

        Shapes:
            vector (groups * out_size,)
        """
        lift = self._lift_of(vector)
        if lift is None:
            return None
        lifted = {
            name: torch.empty(shape, device=vector.device)
            for name, shape in self._operators.shapes.items()
        }
        lift.lift(vector.detach(), [*lifted.values()])
        return lifted

    def lift_onto(
        self, vector: Tensor, base: Sequence[Tensor], into: Sequence[Tensor]
    ) -> bool:
        """Set tensors to base plus what is lifted, and return whether kernels do it.

        Args:
            vector: see `lift`.
            base: tensors of the parameters' sizes, in the order of the map.
            into: others, which are written.
        """
        lift = self._lift_of(vector)
        if lift is None or not lift.takes([*base, *into]):
            return False
        lift.lift(vector.detach(), into, base)
        return True

    def _lift_of(self, vector: Tensor) -> Lift | None:
        """Return what lifts a vector, or None if it is lifted tensor by tensor."""
        device, operators = vector.device, self._operators
        if not self.can_read(device) or vector.dtype != torch.float32:
            return None
        if self._normalizer is not None:
            return None
        if len(vector) != operators.out_size * len(set(operators.group_of.values())):
            return None  # the operators say what is wrong
        if vector.requires_grad and torch.is_grad_enabled():
            return None
        if device not in self._lifts:
            self._lifts[device] = self.begin_lift(device)
        return self._lifts[device]

    def begin_lift(self, device: torch.device) -> Lift:
        """Return what lifts vectors to all parameters, in the order of the map."""
        return Lift(_tensors(self._operators), device)

    def can_read(self, device: torch.device) -> bool:
        """Return whether there are kernels for all operators on a device."""
        operators = self._operators
        if operators.layout == "flat" or not can_launch(device):
            return False
        return all(
            _has_kernel(of)
            for of in (*operators.own.values(), *operators.packed.values())
        )

    def begin(
        self,
        device: torch.device,
        witnesses: int = 0,
        rounding: float = 0.0,
        parts: Mapping[str, range] | None = None,
        join: Callable[[Tensor], Tensor] | None = None,
    ) -> GradientPass:
        """Return what sketches all parameters' gradients, in the order of the map.

        Args:
            device: where the gradients are.
            witnesses: see `GradientPass`.
            rounding: see `GradientPass`.
            parts: elements of each parameter that are in this process, by name; all by
                default.
            join: see `GradientPass`.
        """
        tensors = _tensors(self._operators, parts)
        if self._normalizer is not None:
            tensors = replace(tensors, scales=self._scales(tensors.packed_sizes))
        return GradientPass(tensors, device, witnesses, rounding, join)

    def _scales(self, packed_sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return factors of rows and columns, of each parameter and packed vector."""
        normalizer, operators = self._normalizer, self._operators
        assert normalizer is not None
        scales = {name: normalizer.sides(name) for name in operators.shapes}
        packed = {
            group: torch.zeros(size)
            for group, size in zip(operators.packed, packed_sizes, strict=True)
        }
        for name, place in operators.places.items():
            elements = torch.outer(*scales[name]).flatten()
            packed[operators.group_of[name]][place] = elements
        return [*scales.values(), *((torch.ones(1), x) for x in packed.values())]


def _tensors(
    operators: Operators, parts: Mapping[str, range] | None = None
) -> GradientTensors:
    """Return how each parameter is sketched, or the given parts of each."""
    if parts is None:
        parts = {name: range(math.prod(x)) for name, x in operators.shapes.items()}
    groups = {
        name: i for i, name in enumerate(dict.fromkeys(operators.group_of.values()))
    }
    places = {name: place for place, name in enumerate(operators.shapes)}
    sizes = {g: -(-of.shape[1] // CHUNK) * CHUNK for g, of in operators.packed.items()}
    starts = _starts(sizes)
    own = {name: groups[operators.group_of[name]] for name in operators.own}
    blocked = [
        BlockedTensor(places[name], of, own[name], parts[name])
        for name, of in operators.own.items()
        if isinstance(of, BlockedSketch)
    ]
    for number, (group, of) in enumerate(operators.packed.items()):
        assert isinstance(of, BlockedSketch)
        place, part = len(places) + number, range(of.shape[1])
        blocked.append(BlockedTensor(place, of, groups[group], part, packed=True))
    return GradientTensors(
        [parts[name] for name in operators.shapes],
        blocked,
        [
            GroupedTensor(places[name], of, own[name], parts[name])
            for name, of in operators.own.items()
            if isinstance(of, Grouped)
        ],
        {
            places[name]: starts[operators.group_of[name]] + at.start
            for name, at in operators.places.items()
        },
        [*sizes.values()],
        operators.out_size,
        len(groups),
    )


def _has_kernel(operator: Sketch) -> bool:
    if isinstance(operator, BlockedSketch):
        return adds_blocks(operator)
    return isinstance(operator, Grouped) and folds_matrices(operator)


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return where each group's packed vector begins."""
    starts: dict[str, int] = {}
    end = 0
    for group, size in sizes.items():
        starts[group], end = end, end + size
    return starts
