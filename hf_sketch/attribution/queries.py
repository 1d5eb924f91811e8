"""Queries, checked against the rows that are to answer them."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.columns import query_ids
from hf_sketch.attribution.scores import QueryMatrix
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.blocks import sketch_matrix


class SketchedRows(Protocol):
    """Rows, and the map that made them."""

    @property
    def model_sketch(self) -> ModelSketch:
        """The map."""
        ...

    @property
    def dataset(self) -> Dataset:
        """The rows."""
        ...


def query_matrix(
    rows: SketchedRows, queries: SketchedRows | Mapping[int, SketchedRows]
) -> tuple[np.ndarray[Any, Any], QueryMatrix]:
    """The queries' example ids, and their sketches by state.

    Args:
        rows: rows of the queries.
        queries: for all rows, or by the optimizer step of the model's state.

    Raises:
        TypeError: they are not sketched.
        ValueError: another map made them, one is not finite, states have different
            queries, or the rows have no steps for several states.
    """
    states: dict[Any, Any] = (
        dict(queries) if isinstance(queries, Mapping) else {None: queries}
    )
    for state in states.values():
        if not hasattr(state, "model_sketch"):
            raise TypeError(
                f"queries must be sketched rows, got a {type(state).__name__}: call "
                "sketch_dataset(model, dataset, store.model_sketch) first, or "
                "store.ask(model, tokenizer, text)."
            )
    names = rows.dataset.column_names
    if None not in states and "step" not in names:
        raise ValueError(
            f"Queries at several states need rows with a step, got the columns {names}."
            " Take rows of training or of sketch_checkpoints."
        )
    steps = sorted(states) if None not in states else [None]
    ids = [query_ids(states[step].dataset) for step in steps]
    if not steps or any(not np.array_equal(ids[0], other) for other in ids):
        counts = {step: len(state.dataset) for step, state in states.items()}
        raise ValueError(
            f"The states have different queries: {counts} queries by step. Make them "
            "with sketch_checkpoints of one dataset."
        )
    sketches = tuple(_sketches(rows, states[step]) for step in steps)
    return ids[0], QueryMatrix(
        sketches, None if None in states else torch.tensor(steps)
    )


def _sketches(rows: SketchedRows, queries: SketchedRows) -> Tensor:
    """The sketches of queries as one matrix, (queries, out_size)."""
    if queries.model_sketch != rows.model_sketch:
        raise ValueError(
            "The queries were sketched by another map than these rows. Make them with "
            "sketch_dataset(model, data, store.model_sketch)."
        )
    matrix = sketch_matrix(queries.dataset)
    broken = (~matrix.isfinite().all(1)).nonzero().squeeze(1).tolist()
    if broken:
        raise ValueError(
            f"The queries in rows {broken[:5]} are NaN or infinite. Leave them out "
            "with queries.where(finite=True)."
        )
    return matrix
