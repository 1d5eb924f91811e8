"""Which of the examples that the sampler drew the rows of a batch belong to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.examples.split import Packed

from .contents import Content, Items, contents_of, in_place, length_of, rows_of
from .ids import content_ids
from .prompts import Prompts

_CHECKED_BATCHES = 3
_PREPARING = "_prepare_inputs"  # of a Trainer, as read in transformers 5.24


@dataclass(frozen=True)
class Origins:
    """The examples of a batch, and which of them each row belongs to.

    Args:
        places: each row's example, counted within the batch; None for no example.
        ids: each example's row number in the training set; None for one that fills up
            the batch and was used before.
    """

    places: Sequence[int | None]
    ids: Sequence[int | None]

    @property
    def one_each(self) -> bool:
        """Whether there is one row per example, in their order."""
        return list(self.places) == list(range(len(self.ids)))

    @property
    def parts(self) -> list[int]:
        """Each row's number among the rows of its example."""
        places = list(self.places)
        return [places[:row].count(place) for row, place in enumerate(places)]


FindOrigins = Callable[[Sequence[ModelCall]], Origins]


class OriginFinder:
    """Finds out which rows are whose, by what they are made of.

    The order of the rows is compared with the dataset on the first recorded batches,
    and on all where the Trainer may reorder them after the sampler has drawn. Items are
    collated one by one for it.

    Args:
        trainer: the one that trains.
        loader: its training DataLoader.
        sketcher: reads the rows.
    """

    def __init__(
        self, trainer: Trainer, loader: DataLoader[Any], sketcher: ExampleSketcher
    ) -> None:
        self._name = type(trainer).__name__
        # GRPO and others generate there, and shuffle what they have generated.
        own: Any = getattr(getattr(trainer, _PREPARING), "__func__", None)
        self._prepares = own is not getattr(Trainer, _PREPARING)
        self._main_input = sketcher.main_input
        config = getattr(sketcher.model, "config", None)
        self._padding = getattr(config, "pad_token_id", None)
        device = next(iter(sketcher.parameters.values())).device
        self._items = Items(loader, self._main_input, self._padding, device)
        self._prompts = Prompts(trainer.processing_class)
        self._order: str | None = None
        self._to_check = _CHECKED_BATCHES

    def find(
        self,
        calls: Sequence[ModelCall],
        drawn: Sequence[int | None] | None,
        collated: Any,
    ) -> Origins:
        """Return the origins of a batch's rows, those of one call after another's.

        Args:
            calls: calls of the model.
            drawn: what the sampler has drawn for it, or for the batches that the
                Trainer makes of it; None for a stream, whose rows are known by their
                contents alone.
            collated: the batch as the loader gave it.

        Raises:
            RuntimeError: it cannot be determined.
        """
        sizes = [call.split.size for call in calls]
        if drawn is None:
            return self._of_stream(calls, collated)
        if {*drawn} == {None}:  # it only fills up the last step
            return Origins([None] * sum(sizes), drawn)
        splits = [call.split for call in calls if isinstance(call.split, Packed)]
        if len(splits) == len(calls) and max(sizes) > len(drawn):
            places = [p for split in splits for p in self._documents(split, drawn)]
            return Origins(places, drawn)
        kept: set[bool | None] = {None}
        if isinstance(collated, Mapping):
            kept = {in_place(call.inputs, collated, self._main_input) for call in calls}
        orders = _orders(sizes, len(drawn))
        if kept == {True} and not self._to_check and self._order in orders:
            return Origins(orders[self._order], drawn)
        batches = isinstance(collated, Mapping) and not self._prepares
        doubtful = False in kept or (None in kept and not batches)
        return self._compare(calls, drawn, orders, doubtful)

    def _of_stream(self, calls: Sequence[ModelCall], collated: Any) -> Origins:
        """Return the origins of rows whose examples have no numbers."""
        origins = in_turn(calls, collated, self._main_input)
        if origins is None:
            sizes = [call.split.size for call in calls]
            raise self._unknown(sum(sizes), rows_of(collated, self._main_input))
        parts: list[list[Content]] = [[] for _ in origins.ids]
        for place, content in zip(origins.places, self._contents(calls), strict=True):
            assert place is not None
            parts[place].append(content)
        return Origins(origins.places, content_ids(parts))

    def _contents(
        self, calls: Sequence[ModelCall], padding: int | None = None
    ) -> list[Content]:
        """Return what the rows of all calls are made of."""
        return [
            content
            for call in calls
            for content in contents_of(
                call.inputs, call.split, self._main_input, padding
            )
        ]

    def _compare(
        self,
        calls: Sequence[ModelCall],
        drawn: Sequence[int | None],
        orders: Mapping[str, Sequence[int]],
        doubtful: bool,
    ) -> Origins:
        """Compare rows with items; `doubtful` if their order is no evidence."""
        fits, ids = self._fits(calls, drawn)
        fitting = [
            name
            for name, places in orders.items()
            if all(place in fits[row] for row, place in enumerate(places))
        ]
        if fitting:
            if len(fitting) == 1:
                self._note(fitting[0])
            return Origins(orders[fitting[0]], drawn)
        moved = any(
            own and place not in own
            for own, place in zip(fits, orders.get("in turn", ()), strict=False)
        )
        in_turn = "in turn" in orders and not doubtful
        known = [i for i in drawn if i is not None]
        if in_turn and (not moved or self._items.vary(known)):
            self._note("in turn")
            return Origins(orders["in turn"], drawn)
        places = _least_used(fits)
        short = len(fits) >= len(drawn) and len(set(places)) < len(drawn)
        if not all(fits) or short:
            raise self._unknown(len(fits), len(drawn))
        if len(fits) > len(drawn):
            return Origins(places, drawn)
        return Origins(range(len(places)), [ids[place] for place in places])

    def _fits(
        self, calls: Sequence[ModelCall], drawn: Sequence[int | None]
    ) -> tuple[list[list[int]], list[int | None]]:
        """Return the places of the items that each row may be of, and their ids.

        Items of one prompt are indistinguishable, and get the same id.
        """
        known = sorted({*drawn} - {None})  # type: ignore[type-var]
        with self._items.unnoticed():
            items = {i: self._items.read(i) for i in known}
            contents = {i: self._items.contents(item) for i, item in items.items()}
        mains = [call.inputs.get(self._main_input) for call in calls]
        named = all(isinstance(main, Tensor) for main in mains)
        if named and any(contents.values()):
            fits = [
                [
                    place
                    for place, i in enumerate(drawn)
                    if i is None or any(row.matches(item) for item in contents[i])
                ]
                for row in self._contents(calls, self._padding)
            ]
            return fits, list(drawn)
        prompts = {i: self._prompts.of_item(item) for i, item in items.items()}
        own_prompts: list[str | None] = []
        for call in calls:
            found = self._prompts.of_rows(call.inputs, self._main_input)
            own_prompts += found or [None] * call.split.size
        first: dict[str | None, int] = {}
        for i, prompt in prompts.items():
            first.setdefault(prompt, i)
        ids = [None if i is None else first[prompts[i]] for i in drawn]
        fits = [
            [
                place
                for place, i in enumerate(drawn)
                if i is not None and prompt is not None and prompts[i] == prompt
            ]
            for prompt in own_prompts
        ]
        return fits, ids

    def _documents(
        self, split: Packed, drawn: Sequence[int | None]
    ) -> list[int | None]:
        """Return the places of documents, by the lengths of the items they are in."""
        with self._items.unnoticed():
            items = [None if i is None else self._items.read(i) for i in drawn]
        lengths = [length_of(item, self._main_input) for item in items]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            raise self._unknown(split.size, len(drawn))
        ends = [0, *accumulate(known)]
        places = [
            next((p for p, (a, b) in enumerate(pairwise(ends)) if a <= x < b), None)
            for x in split.starts[:-1]
        ]
        whole = set(ends) <= set(split.starts)
        padding = split.starts[-1] - ends[-1]
        if not whole or places.count(None) != padding:
            raise self._unknown(split.size, len(drawn))
        return places

    def _note(self, order: str) -> None:
        """Keep the order that a batch was found in."""
        same = self._order in (None, order)
        self._to_check = max(0, self._to_check - 1) if same else _CHECKED_BATCHES
        self._order = order

    def _unknown(self, rows: int, drawn: int | None) -> RuntimeError:
        return RuntimeError(
            f"Cannot tell which examples the {rows} rows of a batch belong to: the "
            f"sampler drew {drawn}, {self._name} or its collator gave the model rows "
            "in another order or number, and their contents do not match the dataset's."
            " Keep the order of the sampler, with a collator that gives the same rows "
            "each time, or pass per_example=False."
        )


def in_turn(
    calls: Sequence[ModelCall], collated: Any, main_input: str
) -> Origins | None:
    """Return the origins of rows that lie in the order of a batch, numbered in it.

    None if the calls have other numbers of rows than the batch.
    """
    sizes = [call.split.size for call in calls]
    size = sizes[0] if len(calls) == 1 else rows_of(collated, main_input) or 0
    orders = _orders(sizes, size)
    return Origins(next(iter(orders.values())), range(size)) if orders else None


def _orders(sizes: Sequence[int], drawn: int) -> dict[str, Sequence[int]]:
    """Return the orders in which rows may lie: each row's place among the drawn.

    Args:
        sizes: number of rows of each call of the model.
        drawn: number of examples.
    """
    rows = sum(sizes)
    if rows == drawn:
        return {"in turn": range(rows)}
    if set(sizes) == {drawn}:
        return {"in turn": [*range(drawn)] * len(sizes)}
    if not drawn or rows % drawn:
        return {}
    each = rows // drawn
    return {
        "in blocks": [place for _ in range(each) for place in range(drawn)],
        "in groups": [place for place in range(drawn) for _ in range(each)],
    }


def _least_used(fits: Sequence[Sequence[int]]) -> list[int]:
    """Choose a place for each row that has one, so that equal rows share places."""
    places: list[int] = []
    for own in filter(None, fits):
        places.append(min(own, key=places.count))
    return places
