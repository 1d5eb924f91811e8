"""How the tensors of a batch divide into its examples."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class ExampleSplit(ABC):
    """The examples of a batch, as parts of a tensor.

    There are three ways: `Rows`, `Runs` and `Packed`. `split_of` chooses the batch's,
    `within` that of a tensor which the model makes of the batch.

    Args:
        size: number of examples.
    """

    size: int

    @abstractmethod
    def within(self, x: Tensor) -> "ExampleSplit | None":
        """Return how the examples lie in a tensor; None if it does not divide."""

    @abstractmethod
    def stacked(self, x: Tensor) -> Tensor:
        """Return a tensor that divides with one row per example."""

    @abstractmethod
    def part_of(self, x: Tensor, index: int) -> Tensor:
        """Return one example's part of a tensor that divides, as a batch of one."""

    def rows(self, x: Tensor) -> Tensor | None:
        """Return one row per example, or None if x does not divide.

        Shapes:
            x (b, ...), (b * k, ...), (1, tokens, ...) or (tokens, ...)
            returns (b, ...), (b, k, ...) or (b, longest document, ...)
        """
        way = self.within(x)
        return None if way is None else way.stacked(x)

    def part(self, x: Tensor, index: int) -> Tensor:
        """Return one example's part as a batch of one; x itself if it is shared."""
        way = self.within(x)
        return x if way is None else way.part_of(x, index)

    def some(self, first: int, count: int) -> "ExampleSplit":
        """Return the split of some of the examples."""
        return Rows(count)

    def some_of(self, x: Tensor, first: int, count: int) -> Tensor:
        """Return the part of some of the examples of a tensor that divides."""
        return torch.cat([self.part(x, index) for index in range(first, first + count)])

    def mask(self, x: Tensor, index: int) -> Tensor:
        """Return the tensor with zeros in place of all other examples."""
        kept = torch.zeros_like(x)
        self.part(kept, index).copy_(self.part(x, index))
        return kept

    def first(self, inputs: Mapping[str, Any], count: int) -> Mapping[str, Any]:
        """Return the inputs of the first examples; of all if they are packed."""
        return next(self.pieces(inputs, count))

    def pieces(
        self, inputs: Mapping[str, Any], count: int
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the inputs of `count` examples at a time; of all if they are packed."""
        yield inputs


class Rows(ExampleSplit):
    """One row per example: (b, ...)."""

    def within(self, x: Tensor) -> ExampleSplit | None:
        # A shared tensor whose length is a multiple of b by chance counts as runs.
        if x.dim() == 0 or len(x) == 0 or len(x) % self.size:
            return None
        return self if len(x) == self.size else Runs(self.size)

    def stacked(self, x: Tensor) -> Tensor:
        return x

    def part_of(self, x: Tensor, index: int) -> Tensor:
        return x[index : index + 1]

    def pieces(
        self, inputs: Mapping[str, Any], count: int
    ) -> Iterator[Mapping[str, Any]]:
        for start in range(0, self.size, count):
            yield {
                name: value[start * each : (start + count) * each]
                if isinstance(value, Tensor) and (each := self._rows_each(value))
                else value
                for name, value in inputs.items()
            }

    def _rows_each(self, x: Tensor) -> int:
        """Return how many rows of a tensor are one example's; 0 if it is shared."""
        return 0 if self.within(x) is None else len(x) // self.size


class Runs(ExampleSplit):
    """Equally many rows per example, one example after the other: (b * k, ...)."""

    def within(self, x: Tensor) -> ExampleSplit | None:
        return None if x.dim() == 0 or len(x) % self.size else self

    def stacked(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.size, -1))

    def part_of(self, x: Tensor, index: int) -> Tensor:
        each = len(x) // self.size
        return x[index * each : (index + 1) * each]


@dataclass(frozen=True)
class Packed(ExampleSplit):
    """Documents end to end, in one row (1, tokens, ...) or in none (tokens, ...).

    Args:
        starts: where each document starts, and the number of tokens.
    """

    starts: tuple[int, ...]

    def within(self, x: Tensor) -> ExampleSplit | None:
        return None if self._axis(x) is None else self

    def stacked(self, x: Tensor) -> Tensor:
        documents = [self.part_of(x, index) for index in range(self.size)]
        if self._axis(x):
            documents = [document[0] for document in documents]
        return pad_sequence(documents, batch_first=True)

    def part_of(self, x: Tensor, index: int) -> Tensor:
        axis = self._axis(x)
        assert axis is not None
        start, end = self.starts[index], min(self.starts[index + 1], x.shape[axis])
        return x.narrow(axis, start, end - start)

    def some(self, first: int, count: int) -> ExampleSplit:
        if count == 1:
            return Rows(1)
        starts = self.starts[first : first + count + 1]
        return Packed(count, tuple(start - starts[0] for start in starts))

    def some_of(self, x: Tensor, first: int, count: int) -> Tensor:
        axis = self._axis(x)
        assert axis is not None
        parts = [self.part_of(x, index) for index in range(first, first + count)]
        return torch.cat(parts, dim=axis)

    def _axis(self, x: Tensor) -> int | None:
        """Return the dimension along which the documents lie, if there is one.

        The last token may be missing, which has no next token to be scored.
        """
        lengths = (self.starts[-1], self.starts[-1] - 1)
        if x.dim() > 1 and x.shape[0] == 1 and x.shape[1] in lengths:
            return 1
        return 0 if x.dim() and x.shape[0] in lengths else None


def split_of(inputs: Mapping[str, Any], main_input: str) -> ExampleSplit:
    """Return how a batch that a model is called with divides into examples.

    A single row without an attention mask whose `position_ids` start again is packed.
    Of several such rows, each is an example: it is a row of the dataset.

    Raises:
        ValueError: no tensor among the inputs.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    main = inputs.get(main_input)
    leading = main if isinstance(main, Tensor) else next(iter(tensors), None)
    if leading is None or not leading.dim():
        raise ValueError(
            "Per-example gradients need a model that is called with named tensors, got "
            f"{sorted(inputs)}. Pass per_example=False."
        )
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return Rows(len(leading))
    restarts = (positions == 0).reshape(-1, positions.shape[-1])
    places = restarts[0, 1:].nonzero().flatten().tolist()
    if len(restarts) > 1 or not places:
        return Rows(len(leading))
    starts = (0, *(place + 1 for place in places))  # the first may go on from before
    return Packed(len(starts), (*starts, positions.shape[-1]))
