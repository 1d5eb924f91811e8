"""What rows are picked and grouped by: the columns beside their sketches."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable

from hf_sketch.attribution.scores import RowGroups
from hf_sketch.store.blocks import formatted

EXAMPLE: Final = "example_id"
_SHOWN = 5  # rows in a notebook


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


def row_groups(dataset: Dataset, name: str) -> RowGroups:
    """Group the rows by a column.

    Raises:
        ValueError: there is no such column.
    """
    values, codes = np.unique(column(dataset, name), return_inverse=True)
    return RowGroups(values, torch.from_numpy(codes))


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


def described(self: Any) -> str:
    """Return the line that stands for a store: how much there is of what."""
    rows: Dataset = self.dataset
    parts = [f"{len(rows):,} rows"]
    if EXAMPLE in rows.column_names:
        parts[0] += f" of {len(np.unique(column(rows, EXAMPLE))):,} examples"
    parts += [f"D={self.model_sketch.out_size}"]
    parts += [f"{len(self.steps):,} steps"] if self.steps is not None else []
    r = self.measured_error and self.measured_error.pearson_r
    parts += [f"r={r:.3f}"] if r is not None else []
    return f"{type(self).__name__}({', '.join(parts)})"


def shown_in_html(self: Any) -> str:
    """Return a store's line and first rows, without sketches, as a notebook shows."""
    rows: Dataset = self.dataset
    names = [name for name in rows.column_names if name != "sketch"]
    first: Any = rows.select(range(min(_SHOWN, len(rows)))).select_columns(names)
    return f"<p>{html.escape(repr(self))}</p>{first.to_pandas().to_html(index=False)}"


def query_ids(dataset: Dataset) -> np.ndarray[Any, Any]:
    """The ids of the examples, or else the steps, that rows are about."""
    examples = "example_id" in dataset.column_names
    return column(dataset, "example_id" if examples else "step")
