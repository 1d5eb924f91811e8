"""The sketches of a batch's per-example gradients, added up use by use."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sketch.examples.rules import Contribution
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import QK
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import form_outer


class GradientSums:
    """Sums of contributions to the gradients of a batch's examples.

    A weight's gradient is sketched as it comes; only gradients of parameters that share
    an operator (each below 2**16 elements) are held until `rows` is called.

    Args:
        model_sketch: the map.
        parameters: what it sketches, by name.
        size: number of examples.
    """

    def __init__(
        self, model_sketch: ModelSketch, parameters: Mapping[str, Tensor], size: int
    ) -> None:
        self.names: set[str] = set()
        self._model_sketch = model_sketch
        self._parameters = parameters
        like = next(iter(parameters.values()))
        self._dtype = accumulation_dtype(like.dtype)
        self._rows = torch.zeros(
            size, model_sketch.out_size, dtype=self._dtype, device=like.device
        )
        self._formed: dict[str, Tensor] = {}

    def fold(self, name: str, factor: Tensor, side: int) -> Tensor:
        """What has to be kept of one side of a parameter's outer products."""
        operator = self._factored(name)
        if operator is None:
            return factor
        if factor.is_floating_point():
            factor = factor.to(self._dtype)
        return operator.fold(factor, side)

    def add(self, name: str, contribution: Contribution) -> None:
        """Add a contribution to every example's gradient of a parameter.

        Two-sided ones have their sides folded.
        """
        self.names.add(name)
        left, right = contribution.left, contribution.right
        if left.is_floating_point():
            left = left.to(self._dtype)
        operator = self._factored(name)
        if right is None:
            self._add_rows(name, left.reshape(len(left), -1), slice(None))
        elif operator is not None:
            operator.add_folded_(self._rows, left, right)
        elif (plain := self._model_sketch.operators.get(name)) is not None:
            self._rows += plain.apply_outer(left, right.to(self._dtype))
        else:
            size = self._parameters[name].numel()
            formed = form_outer(left, right.to(self._dtype), 0, size)
            self._add_rows(name, formed, slice(None))

    def add_example(self, name: str, index: int, gradient: Tensor) -> None:
        """Add to one example's gradient of a parameter, given in its own shape."""
        self.names.add(name)
        row = gradient.reshape(1, -1).to(self._dtype)
        self._add_rows(name, row, slice(index, index + 1))

    def rows(self) -> Tensor:
        """The sums so far: (b, out_size)."""
        if not self._formed:
            return self._rows
        return self._rows + self._model_sketch.sketch_rows(self._formed)

    def _add_rows(self, name: str, rows: Tensor, examples: slice) -> None:
        """Add gradients of a parameter, flattened: (examples, elements)."""
        operator = self._model_sketch.operators.get(name)
        if operator is not None:
            self._rows[examples] += operator.apply_rows(rows)
            return
        if name not in self._formed:
            self._formed[name] = rows.new_zeros(len(self._rows), rows.shape[1])
        self._formed[name][examples] += rows

    def _factored(self, name: str) -> QK | None:
        """The parameter's operator, if it takes the two sides apart."""
        operator = self._model_sketch.operators.get(name)
        shape = tuple(self._parameters[name].shape)
        if isinstance(operator, QK) and operator.sides == shape:
            return operator
        return None
