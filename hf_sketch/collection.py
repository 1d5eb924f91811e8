"""Sketches as a user holds them: rows, the map that made them, and their scores."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from hf_sketch.attribution import sketch_matrix, top_rows
from hf_sketch.measured_error import MeasuredError
from hf_sketch.model_sketch import ModelSketch
from hf_sketch.store import (
    HEADER,
    PER_EXAMPLE,
    PER_STEP,
    Shard,
    check_shard,
    features,
    read_header,
    read_manifest,
)


@dataclass(frozen=True)
class Sketches:
    """Sketched gradients and the map that made them.

    Args:
        model_sketch: the map; `sketch_dataset` makes queries for these rows with it.
        dataset: one row per example and occasion, with the columns of docs/format.md.
        steps: one row per optimizer step; None for sketches made outside training.
        measured_error: how far inner products of these rows are from exact ones, as
            measured on the first examples; None if it was not measured.
    """

    model_sketch: ModelSketch
    dataset: Dataset
    steps: Dataset | None = None
    measured_error: MeasuredError | None = None

    def where(self, **values: Any) -> "Sketches":
        """The rows whose columns equal the given values, e.g. `where(epoch=2)`.

        Raises:
            ValueError: there is no such column.
        """
        rows = torch.arange(len(self.dataset))
        columns = self.dataset.with_format("numpy")
        for name, value in values.items():
            if name not in self.dataset.column_names or name == "sketch":
                names = [n for n in self.dataset.column_names if n != "sketch"]
                raise ValueError(f"a column must be one of {names}, got {name!r}.")
            equal = torch.as_tensor(columns[name][:] == value)
            rows = rows[equal[rows]]
        return dataclasses.replace(self, dataset=self.dataset.select(rows.tolist()))

    def attribute(
        self,
        queries: "Sketches",
        top_k: int = 10,
        method: str = "dot",
        largest: bool = True,
    ) -> Dataset:
        """The rows that moved the model most for, or against, each query.

        The score of a row and a query is the inner product of their gradients ("dot")
        or its cosine ("cosine"). A positive score marks a proponent: a small gradient
        step on the row's example lowers the query's loss, by learning rate * score to
        first order. `largest=False` gives the strongest opponents instead.

        An example met in several epochs has a row for each; `where(epoch=...)` picks
        one. Rows are read from disk in one pass; memory does not grow with them.

        Returns:
            one line per query and rank, best first: query (its row in `queries`),
            query_id, rank (from 0), score, and of the row its example_id, loss and,
            if it was recorded in training, step and epoch.

        Raises:
            ValueError: the queries were sketched by another map, a query is not finite,
                `top_k` is below 1, or the method is unknown.
        """
        if queries.model_sketch != self.model_sketch:
            raise ValueError(
                "the queries must be sketched by the map of this store, got another: "
                "make them with sketch_dataset(model, data, store.model_sketch)."
            )
        matrix = sketch_matrix(queries.dataset)
        broken = (~matrix.isfinite().all(1)).nonzero().squeeze(1).tolist()
        if broken:
            raise ValueError(
                f"every query needs a finite gradient, got NaN or infinity in rows "
                f"{broken[:5]}: leave them out with queries.where(finite=True)."
            )
        scores, rows = top_rows(self.dataset, matrix, top_k, method, largest)
        count, kept = rows.shape
        chosen = self.dataset.select(rows.flatten().tolist()).with_format("numpy")
        ids = torch.as_tensor(queries.dataset["example_id"][:], dtype=torch.int64)
        lines: dict[str, Any] = {
            "query": torch.arange(count).repeat_interleave(kept).numpy(),
            "query_id": ids.repeat_interleave(kept).numpy(),
            "rank": torch.arange(kept).repeat(count).numpy(),
            "score": scores.flatten().numpy(),
        }
        for name in ("example_id", "loss", "step", "epoch"):
            if name in self.dataset.column_names:
                lines[name] = chosen[name][:]
        return Dataset.from_dict(lines)


def load_sketches(path: str | Path, skip_damaged: bool = False) -> Sketches:
    """Open the sketches that a GradientSketchCallback left beside the checkpoints.

    The rows are memory-mapped, not read.

    Args:
        path: the Trainer's `output_dir`, or the `sketches` directory in it.
        skip_damaged: leave out files that are missing or truncated, with a warning,
            instead of raising.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a file is damaged, or the header is of another version or map.
    """
    directory = Path(path)
    if not (directory / HEADER).exists():
        directory = directory / "sketches"
    header = read_header(directory)
    shards = read_manifest(directory)
    if skip_damaged:
        shards = [shard for shard in shards if _is_whole(directory, shard)]
    for shard in shards:
        check_shard(directory, shard)
    out_size = header.model_sketch.out_size
    return Sketches(
        header.model_sketch,
        _open(directory, shards, PER_EXAMPLE, out_size),
        _open(directory, shards, PER_STEP, out_size),
        header.measured_error,
    )


def _is_whole(directory: Path, shard: Shard) -> bool:
    """Whether a shard can be read; a warning says so if not."""
    try:
        check_shard(directory, shard)
    except ValueError as error:
        message = f"{shard.rows} rows left out: {error}"
        warnings.warn(message, stacklevel=3)
        return False
    return True


def _open(directory: Path, shards: list[Shard], kind: str, out_size: int) -> Dataset:
    """All rows of a kind, memory-mapped."""
    files = [str(directory / shard.file) for shard in shards if shard.kind == kind]
    if not files:
        columns = features(kind, out_size)
        return Dataset.from_dict({name: [] for name in columns}, features=columns)
    return concatenate_datasets([Dataset.from_file(file) for file in files])
