"""How the tensors of a batch divide into its examples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class ExampleSplit:
    """The examples of a batch, as parts of every tensor's leading dimension.

    Examples are rows (b, ...), or runs of equal length (b * k, ...) where a model
    merges dimensions. In a packed batch they are documents, end to end in one row
    (1, tokens, ...) or in none (tokens, ...).

    Args:
        size: number of examples.
        starts: where each packed document starts, and the number of tokens; empty if
            the batch is not packed.
    """

    size: int
    starts: tuple[int, ...] = ()

    @classmethod
    def of_inputs(cls, inputs: Mapping[str, Any], main_input: str) -> "ExampleSplit":
        """The split of a batch that a model is called with.

        A single row without an attention mask whose `position_ids` start again is
        packed.

        Raises:
            ValueError: no tensor among the inputs, or several packed rows.
        """
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        main = inputs.get(main_input)
        leading = main if isinstance(main, Tensor) else next(iter(tensors), None)
        if leading is None or not leading.dim():
            raise ValueError(
                "per-example gradients need a model that is called with named tensors, "
                f"got {sorted(inputs)}: pass per_example=False."
            )
        positions = inputs.get("position_ids")
        if (
            not isinstance(positions, Tensor)
            or inputs.get("attention_mask") is not None
        ):
            return cls(len(leading))
        starts = (positions == 0).reshape(-1, positions.shape[-1])
        if int(starts.sum(1).max()) <= 1:
            return cls(len(leading))
        if len(starts) > 1:
            raise ValueError(
                "packed documents must lie in one row, got position_ids that start "
                f"again in {len(starts)} rows: pack with DataCollatorWithFlattening, "
                "or pass per_example=False."
            )
        places = starts[0].nonzero().flatten().tolist()
        return cls(len(places), (*places, positions.shape[-1]))

    def rows(self, x: Tensor) -> Tensor | None:
        """One row an example, documents padded with zeros; None if x does not divide.

        Shapes:
            x (b, ...), (b * k, ...), (1, tokens, ...) or (tokens, ...)
            returns (b, ...), (b, k, ...) or (b, longest document, ...)
        """
        if not self.starts:
            if x.dim() == 0 or len(x) == 0 or len(x) % self.size:
                return None
            return x if len(x) == self.size else x.unflatten(0, (self.size, -1))
        axis = self._axis(x)
        if axis is None:
            return None
        lengths = [after - before for before, after in pairwise(self.starts)]
        documents = (x[0] if axis else x).split(lengths)
        return pad_sequence(list(documents), batch_first=True)

    def part(self, x: Tensor, index: int) -> Tensor:
        """What belongs to one example, as a batch of one; x itself if it is shared."""
        if self.starts:
            axis = self._axis(x)
            if axis is None:
                return x
            return x.narrow(axis, self.starts[index], self._length(index))
        if x.dim() == 0 or len(x) % self.size:
            return x
        each = len(x) // self.size
        return x[index * each : (index + 1) * each]

    def first(self, inputs: Mapping[str, Any], count: int) -> Mapping[str, Any]:
        """The inputs of the first examples; of all if they are packed."""
        return next(self.pieces(inputs, count))

    def pieces(
        self, inputs: Mapping[str, Any], count: int
    ) -> Iterator[Mapping[str, Any]]:
        """The inputs of some examples after the other; of all if they are packed."""
        if self.starts:
            yield inputs
            return
        for start in range(0, self.size, count):
            yield {
                name: value[start : start + count]
                if isinstance(value, Tensor) and value.dim() and len(value) == self.size
                else value
                for name, value in inputs.items()
            }

    def mask(self, x: Tensor, index: int) -> Tensor:
        """The same tensor with zeros in place of all other examples."""
        kept = torch.zeros_like(x)
        self.part(kept, index).copy_(self.part(x, index))
        return kept

    def _axis(self, x: Tensor) -> int | None:
        """The dimension along which packed documents lie."""
        if x.dim() > 1 and x.shape[0] == 1 and x.shape[1] == self.starts[-1]:
            return 1
        return 0 if x.dim() and x.shape[0] == self.starts[-1] else None

    def _length(self, index: int) -> int:
        return self.starts[index + 1] - self.starts[index]
