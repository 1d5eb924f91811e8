"""What the rows of a batch are made of, beside what items of the dataset are."""

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_sketch.examples.attempt import attempt
from hf_sketch.examples.split import ExampleSplit, split_of
from hf_sketch.model.state import kept_random_state, random_state

_IGNORED = -100


@dataclass(frozen=True)
class Content:
    """A row as the model sees it, without padding.

    Args:
        main: bytes of the model's main input.
        labels: bytes of its labels; None where there are none.
    """

    main: bytes
    labels: bytes | None

    def matches(self, other: "Content") -> bool:
        """Return whether both may be of one example."""
        labels = {self.labels, other.labels} - {None}
        return self.main == other.main and len(labels) < 2


def contents_of(
    inputs: Mapping[str, Any],
    split: ExampleSplit,
    main_input: str,
    padding: int | None = None,
) -> list[Content]:
    """Return what each example of a batch is made of.

    Padding is where attention_mask is 0, a label is -100 or, without a mask, a token is
    `padding`.
    """
    main, labels = inputs[main_input].detach().cpu(), inputs.get("labels")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == main.shape:
        kept = mask.cpu() != 0
    elif padding is None or main.is_floating_point():
        kept = None
    else:
        kept = main != padding
    contents: list[Content] = []
    for index in range(split.size):
        own, own_labels = split.part(main, index), None
        if kept is not None:
            own = own[split.part(kept, index)]
        if isinstance(labels, Tensor):
            part = split.part(labels.detach().cpu(), index)
            own_labels = _bytes(part[part != _IGNORED])
        contents.append(Content(_bytes(own), own_labels))
    return contents


class Items:
    """Items of the training set, read and collated one by one.

    Call `read` and `contents` within `unnoticed`, which keeps training's random
    numbers. The loader's collator does not change either: a copy works here.

    Args:
        loader: the training DataLoader.
        main_input: name of the model's main input.
        padding: the token that pads; None if it is not known.
        device: where the model is.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        main_input: str,
        padding: int | None,
        device: torch.device,
    ) -> None:
        self._dataset = loader.dataset
        self._main_input, self._padding, self._device = main_input, padding, device
        self._collate: Callable[[list[Any]], Any] | None = None
        with attempt():  # some cannot be copied: nothing is compared then
            self._collate = deepcopy(loader.collate_fn)

    def read(self, index: int) -> Any:
        """Return an item as the dataset gives it; None if it gives none."""
        item = None
        with attempt():
            item = self._dataset[index]
        return item

    def contents(self, item: Any) -> list[Content]:
        """Return what the model sees of an item; nothing if that is unknown."""
        found: list[Content] = []
        with attempt():
            inputs = None if self._collate is None else self._collate([item])
            if isinstance(inputs, Mapping):
                found = self._contents(inputs)
        return found

    def vary(self, indices: Sequence[int]) -> bool:
        """Return whether items differ each time that they are read."""

        def contents(index: int) -> list[Content]:
            with self.unnoticed():
                return self.contents(self.read(index))

        first, second = ([contents(index) for index in indices] for _ in range(2))
        return first != second

    def _contents(self, inputs: Mapping[str, Any]) -> list[Content]:
        found: list[Content] = []
        for prefix in self._prefixes(inputs):
            renamed = {
                name.removeprefix(prefix): value
                for name, value in inputs.items()
                if name.startswith(prefix)
            }
            split = split_of(renamed, self._main_input)
            found += contents_of(renamed, split, self._main_input, self._padding)
        return found

    def _prefixes(self, inputs: Mapping[str, Any]) -> list[str]:
        """Return what comes before the main input's name, as in "chosen_input_ids"."""
        names = [
            name
            for name, value in inputs.items()
            if name.endswith(self._main_input)
            and isinstance(value, Tensor)
            and value.dim()
        ]
        main = [name for name in names if name == self._main_input]
        return [name.removesuffix(self._main_input) for name in main or names]

    @contextmanager
    def unnoticed(self) -> Generator[None]:
        """Within, keep the random numbers of training, and the dataset's own."""
        undo = _restoring(self._dataset)
        state = random_state(self._device, everywhere=True)
        try:
            with kept_random_state(state, self._device):
                yield
        finally:
            for restore in undo:
                restore()


def _restoring(owner: object) -> list[Callable[[], object]]:
    """Return what restores a dataset's attributes, and generators among them."""
    attributes: dict[str, Any] = getattr(owner, "__dict__", {})
    undo: list[Callable[[], object]] = [partial(attributes.update, dict(attributes))]
    for value in attributes.values():
        if isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            undo.append(partial(setattr, bits, "state", bits.state))
        elif isinstance(value, np.random.RandomState):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, Dataset):
            undo += _restoring(value)
    return undo


def in_place(
    seen: Mapping[str, Any], collated: Mapping[str, Any], main_input: str
) -> bool | None:
    """Return whether a model got the rows of a batch in the order of that batch.

    None where the two have nothing in common to compare.
    """
    given = [x for x in collated.values() if isinstance(x, Tensor) and x.numel()]
    places = {(x.data_ptr(), x.shape) for x in given}
    if any(
        isinstance(x, Tensor) and (x.data_ptr(), x.shape) in places
        for x in seen.values()
    ):
        return True
    ours, theirs = seen.get(main_input), collated.get(main_input)
    if not isinstance(ours, Tensor) or not ours.dim():
        return None
    if theirs is None:  # as one of several columns, on another device
        columns = [x for n, x in collated.items() if n.endswith(main_input)]
        return any(_are_equal(ours, x) for x in columns) or None
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return None
    return _in_order(ours.detach(), theirs.to(ours.device))


def rows_of(collated: Any, main_input: str) -> int | None:
    """Return the number of examples in a batch; None if that is not known."""
    if not isinstance(collated, Mapping):
        return None
    columns: Mapping[str, Any] = collated
    sizes = {
        len(x)
        for name, x in columns.items()
        if name.endswith(main_input) and isinstance(x, Tensor) and x.dim()
    }
    return sizes.pop() if len(sizes) == 1 else None


def _are_equal(ours: Tensor, theirs: Any) -> bool:
    """Return whether a column of a batch is what the model got."""
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return False
    return torch.equal(ours, theirs.to(ours.device))


def _in_order(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether no row is nearer to another's original than to its own."""
    for index, row in enumerate(ours):
        if row.is_floating_point():
            near = -(theirs - row).abs().flatten(1).sum(1)
        else:
            near = (theirs == row).flatten(1).sum(1)
        if bool(near[index] < near.max()):
            return False
    return True


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def length_of(item: Any, main_input: str) -> int | None:
    """Return the number of tokens of an item; None if that is not known."""
    tokens: Any = item.get(main_input) if isinstance(item, Mapping) else None
    return len(tokens) if isinstance(tokens, (list, Tensor)) else None
