"""Answers to queries: lines about the rows, or groups of rows, that score highest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from hf_sketch.attribution.columns import (
    EXAMPLE,
    row_groups,
    taken_rows,
    with_columns,
)
from hf_sketch.attribution.methods import Method
from hf_sketch.attribution.scores import (
    BestRows,
    QueryMatrix,
    RowGroups,
    best_groups,
    best_rows,
)
from hf_sketch.attribution.shares import RowShare

_NOT_TOLD = ("sketch", "scale", "finite", "micro_step", "rank")


def answers(
    share: RowShare,
    ids: np.ndarray[Any, Any],
    queries: QueryMatrix,
    method: Method,
    groups: str | None,
    counts: tuple[int, int],
) -> Dataset:
    """Return the lines of each query, from the greatest score to the least.

    Shapes:
        ids (queries,)

    Args:
        share: the rows.
        ids: ids of the queries.
        queries: their sketches.
        method: what scores are.
        groups: the column whose values lines are about; None for a line per row, as
            for rows without example ids.
        counts: numbers of lines with the greatest and with the least scores.
    """
    dataset = share.dataset
    if groups == EXAMPLE and EXAMPLE not in dataset.column_names:
        groups = None
    if groups is None:
        return answer_lines(ids, *best_rows(share, queries, method, *counts), dataset)
    grouped = row_groups(dataset, groups)
    if groups == EXAMPLE and grouped.count == len(dataset):
        lines = answer_lines(ids, *best_rows(share, queries, method, *counts), dataset)
        return lines.add_column("rows", np.ones(len(lines), dtype=np.int64))
    found = best_groups(share, queries, method, grouped, *counts)
    return answer_lines(ids, *found, group_columns(dataset, groups, grouped))


def check_lines(top_k: int, bottom_k: int) -> None:
    """Raise unless a query is to be answered by at least one line."""
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(
            f"top_k must be at least 1, or bottom_k, got {top_k} and {bottom_k}: pass 1"
            " or more of either."
        )


def with_texts(
    lines: Dataset, dataset: Dataset, id2label: Mapping[int, str] | None
) -> Dataset:
    """Add the texts and the label of each line's example, from its dataset.

    Raises:
        ValueError: an example is not in the dataset, or it has neither.
    """
    texts = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    labels = [name for name in ("label", "labels") if name in dataset.column_names]
    names = [name for name in (*texts, *labels[:1]) if name not in lines.column_names]
    if not names:
        raise ValueError(
            f"the dataset must have a column of texts or labels, got columns "
            f"{dataset.column_names}: pass it as it was before it was tokenized."
        )
    lines = with_columns(lines, dataset, tuple(names), None)
    for name in set(labels[:1]) & set(names):
        known = getattr(dataset.features[name], "names", None) or id2label
        if known is not None:
            spoken = [known[value] for value in lines[name][:]]
            lines = lines.remove_columns(name).add_column(name, spoken)
    return lines


def group_columns(dataset: Dataset, name: str, groups: RowGroups) -> Dataset:
    """Return what answers say of each group: its value and its number of rows.

    Of an example they also say what its last row has in the other columns.
    """
    counts = torch.bincount(groups.codes, minlength=groups.count).numpy()
    if name != EXAMPLE:
        return Dataset.from_dict({name: groups.values, "rows": counts})
    last = np.zeros(groups.count, dtype=np.int64)
    last[groups.codes.numpy()] = np.arange(len(groups.codes))  # the last one stays
    names = [n for n in dataset.column_names if n not in _NOT_TOLD]
    return taken_rows(dataset, last, names).add_column("rows", counts)


def answer_lines(
    ids: np.ndarray[Any, Any], best: BestRows, worst: BestRows, about: Dataset
) -> Dataset:
    """Return a line for each query and place: its score, and its place's columns."""
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
    names = [name for name in about.column_names if name not in _NOT_TOLD]
    columns = taken_rows(about, places.flatten().numpy(), names)
    return concatenate_datasets([Dataset.from_dict(lines), columns], axis=1)
