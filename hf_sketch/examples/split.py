"""How the tensors of a batch divide into its examples."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_sketch.examples.media import NO_MEDIA, Media, media_of


@dataclass(frozen=True)
class ExampleSplit(ABC):
    """The examples of a batch, as parts of a tensor.

    There are four ways: `Rows`, `Runs`, `Uneven` and `Packed`. `split_of` chooses the
    batch's, `within` that of a tensor which the model makes of the batch.

    Args:
        size: number of examples.
    """

    size: int

    @property
    def is_uneven(self) -> bool:
        """Whether examples have unequally many rows of some input."""
        return False

    @property
    def kind(self) -> object:
        """What the rules that fit a batch depend on."""
        return type(self)

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

    def of_input(self, name: str, x: Tensor) -> "ExampleSplit | None":
        """Return how the examples lie in an input; None if they share it."""
        return self.within(x)

    def some(self, first: int, count: int) -> "ExampleSplit":
        """Return the split of some of the examples."""
        return Rows(count)

    def some_of(self, x: Tensor, first: int, count: int) -> Tensor:
        """Return the part of some of the examples of a tensor that divides."""
        return torch.cat([self.part(x, index) for index in range(first, first + count)])

    def share(self, name: str, x: Any, first: int, count: int = 1) -> Any:
        """Return some examples' share of an input; None if they have nothing of it."""
        way = self.of_input(name, x) if isinstance(x, Tensor) else None
        if way is None:
            return x
        part = way.some_of(x, first, count)
        return part if len(part) else None

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


@dataclass(frozen=True)
class Rows(ExampleSplit):
    """One row per example: (b, ...).

    Args:
        media: images and the like of which examples have unequally many.
        tokens: number of tokens in the batch, if there are such.
    """

    media: Media = NO_MEDIA
    tokens: int = 0

    @property
    def is_uneven(self) -> bool:
        return bool(self.media)

    @property
    def kind(self) -> object:
        return type(self), self.media.kind

    def within(self, x: Tensor) -> ExampleSplit | None:
        # A shared tensor whose length is a multiple of b by chance counts as runs.
        length = x.shape[0] if x.dim() else 0
        if length == 0:
            return None
        if length == self.size:
            return self
        found = self.media.within(length)
        if found:  # in two ways, it is not known of whom the rows are
            known = len(found) == 1 and length % self.tokens
            return Uneven(self.size, found.pop()) if known else None
        if self.media and length % self.tokens:  # images whose number fits by chance
            return None
        return None if length % self.size else Runs(self.size)

    def stacked(self, x: Tensor) -> Tensor:
        return x

    def part_of(self, x: Tensor, index: int) -> Tensor:
        return x[index : index + 1]

    def of_input(self, name: str, x: Tensor) -> ExampleSplit | None:
        if name in self.media.unknown:
            return None
        starts = dict(self.media.starts).get(name)
        return self.within(x) if starts is None else Uneven(self.size, starts)

    def share(self, name: str, x: Any, first: int, count: int = 1) -> Any:
        if self.media.lacks(name, first, count):
            return None
        return super().share(name, x, first, count)

    def some(self, first: int, count: int) -> ExampleSplit:
        media = self.media.some(first, count)
        return Rows(count, media, self.tokens // self.size * count if media else 0)

    def pieces(
        self, inputs: Mapping[str, Any], count: int
    ) -> Iterator[Mapping[str, Any]]:
        for start in range(0, self.size, count):
            some = min(count, self.size - start)
            yield {
                name: self.share(name, value, start, some)
                for name, value in inputs.items()
            }


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
class Uneven(ExampleSplit):
    """Any number of rows per example, one example after the other: (rows, ...).

    Args:
        starts: where the rows of each example start, and their number.
    """

    starts: tuple[int, ...]

    def within(self, x: Tensor) -> ExampleSplit | None:
        return self if x.dim() and len(x) == self.starts[-1] else None

    def stacked(self, x: Tensor) -> Tensor:
        parts = [self.part_of(x, index) for index in range(self.size)]
        return pad_sequence(parts, batch_first=True)

    def part_of(self, x: Tensor, index: int) -> Tensor:
        return x[self.starts[index] : self.starts[index + 1]]


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


def split_of(
    inputs: Mapping[str, Any],
    main_input: str,
    placeholders: Mapping[str, int] | None = None,
) -> ExampleSplit:
    """Return how a batch that a model is called with divides into examples.

    A single row without an attention mask whose `position_ids` start again is packed.
    Of several such rows, each is an example: it is a row of the dataset.

    Args:
        inputs: inputs by name.
        main_input: name of the first.
        placeholders: placeholders of the model, if it takes images or sounds; see
            `placeholders_of`.

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
    if isinstance(positions, Tensor) and inputs.get("attention_mask") is None:
        restarts = (positions == 0).reshape(-1, positions.shape[-1])
        places = restarts[0, 1:].nonzero().flatten().tolist()
        if len(restarts) == 1 and places:
            # The first may go on from before.
            starts = (0, *(place + 1 for place in places), positions.shape[-1])
            return Packed(len(starts) - 1, starts)
    media = NO_MEDIA
    if placeholders and leading.dim() == 2 and len(leading) > 1:
        media = media_of(inputs, leading, placeholders)
    return Rows(len(leading), media, leading.numel() if media else 0)
