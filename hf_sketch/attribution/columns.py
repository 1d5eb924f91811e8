"""What rows are picked, grouped and told by: the columns beside their sketches."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from torch import Tensor

from hf_sketch.attribution.scores import BestRows
from hf_sketch.store.blocks import formatted

_NOT_TOLD = ("sketch", "scale", "finite", "micro_step", "rank")


def matching_rows(dataset: Dataset, values: Mapping[str, Any]) -> Dataset:
    """The rows whose columns equal the values, or any of several.

    Raises:
        ValueError: there is no such column, or no such row.
    """
    chosen = np.ones(len(dataset), dtype=bool)
    for name, value in values.items():
        several = isinstance(value, Iterable) and not isinstance(value, str)
        wanted: list[Any] = [*value] if several else [value]
        chosen &= np.isin(column(dataset, name), np.asarray(wanted))
    if not chosen.any():
        raise ValueError(
            f"some of the {len(chosen)} rows must have {dict(values)}, got none: see "
            "the values that there are with store.dataset.unique(column)."
        )
    return dataset.select(chosen.nonzero()[0])


def with_columns(
    dataset: Dataset, other: Dataset, names: tuple[str, ...], on: str | None
) -> Dataset:
    """The rows with columns of the dataset that has their examples.

    Raises:
        ValueError: an example is not in it.
    """
    ids = column(dataset, "example_id")
    keys = np.arange(len(other)) if on is None else np.asarray(other[on][:])
    order = keys.argsort()
    places = np.searchsorted(keys, ids, sorter=order).clip(max=len(keys) - 1)
    rows = order[places]
    absent = np.unique(ids[keys[rows] != ids])
    if len(absent):
        raise ValueError(
            f"every example_id must be in the dataset, got {absent[:5].tolist()} of "
            f"{len(keys)} rows: pass the train_dataset of the run, and the column of"
            " its ids as on=... if they are not row numbers."
        )
    columns = taken_rows(other, rows, names)
    return concatenate_datasets([dataset, columns], axis=1)


def row_groups(dataset: Dataset, name: str) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The sorted values of a column, and which of them each row has."""
    values, codes = np.unique(column(dataset, name), return_inverse=True)
    return values, torch.from_numpy(codes)


def taken_rows(
    dataset: Dataset, places: np.ndarray[Any, Any], names: Sequence[str]
) -> Dataset:
    """Some columns of some rows of a dataset, in any order, in memory."""
    table: Any = formatted(dataset, "arrow", names).select(places)[:]
    return Dataset(InMemoryTable(table))


def column(dataset: Dataset, name: str) -> np.ndarray[Any, Any]:
    """All values of a column.

    Raises:
        ValueError: there is no such column.
    """
    names = [n for n in dataset.column_names if n != "sketch"]
    if name not in names:
        raise ValueError(
            f"a column must be one of {names}, got {name!r}: add those of the "
            "train_dataset with store.join(train_dataset, ...)."
        )
    return np.asarray(formatted(dataset, "numpy", [name])[name][:])


def query_ids(dataset: Dataset) -> np.ndarray[Any, Any]:
    """The ids of the examples, or else the steps, that rows are about."""
    examples = "example_id" in dataset.column_names
    return column(dataset, "example_id" if examples else "step")


def ids_of_states(states: Mapping[int, Dataset]) -> np.ndarray[Any, Any]:
    """The ids that queries have at each of several states, by step.

    Raises:
        ValueError: the states have different queries.
    """
    ids = [query_ids(dataset) for dataset in states.values()]
    if not ids or any(not np.array_equal(ids[0], other) for other in ids):
        raise ValueError(
            "The states have different queries: "
            f"{ {step: len(x) for step, x in states.items()} } queries by step. "
            "Make them with sketch_checkpoints of one dataset."
        )
    return ids[0]


def check_lines(top_k: int, bottom_k: int) -> None:
    """Raise unless a query is to be answered by at least one line."""
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(
            f"top_k must be at least 1, or bottom_k, got {top_k} and {bottom_k}: pass 1"
            " or more of either."
        )


def answer_lines(
    ids: np.ndarray[Any, Any], best: BestRows, worst: BestRows, told: Dataset
) -> Dataset:
    """A line for each query and place, of the scores and of what is told of it."""
    places = torch.cat([best.places, worst.places.flip(1)], 1)
    scores = torch.cat([best.scores, -worst.scores.flip(1)], 1)
    top, bottom = best.places.shape[1], worst.places.shape[1]
    ranks = torch.cat([torch.arange(top), torch.arange(-bottom, 0)])
    lines = {
        "query": np.arange(len(ids)).repeat(len(ranks)),
        "query_id": ids.repeat(len(ranks)),
        "rank": ranks.repeat(len(ids)).numpy(),
        "score": scores.flatten().numpy(),
    }
    names = [name for name in told.column_names if name not in _NOT_TOLD]
    columns = taken_rows(told, places.flatten().numpy(), names)
    return concatenate_datasets([Dataset.from_dict(lines), columns], axis=1)
