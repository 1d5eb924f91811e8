"""Sketches as a user holds them: rows, the map that made them, and their scores."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_sketch.attribution import sketch_matrix, top_rows
from hf_sketch.hub import push_store, store_directory
from hf_sketch.measured_error import MeasuredError
from hf_sketch.model_sketch import ModelSketch
from hf_sketch.rows import PER_EXAMPLE, PER_STEP, features
from hf_sketch.shards import Shard, check_shard, contents_are_checked, open_shards
from hf_sketch.store import (
    Manifest,
    missing_ranks,
    read_header,
    read_manifests,
    shards_of,
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
        directory: the store; None for sketches in memory.
    """

    model_sketch: ModelSketch
    dataset: Dataset
    steps: Dataset | None = None
    measured_error: MeasuredError | None = None
    directory: Path | None = None

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the whole store to a dataset repository of the Hub.

        `load_sketches(repo_id)` opens it again.

        Returns:
            the commit's address.

        Raises:
            ValueError: the sketches are in memory only.
        """
        if self.directory is None:
            raise ValueError(
                "only a store on disk can be pushed, got sketches in memory: pass those"
                " of load_sketches."
            )
        return push_store(self.directory, repo_id, private, token)

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


def load_sketches(
    path: str | Path,
    skip_damaged: bool = False,
    verify: bool | None = None,
    **hub_options: Any,
) -> Sketches:
    """Open the sketches that a GradientSketchCallback left beside the checkpoints.

    The rows are memory-mapped. What is missing from the store, because a process died
    or recording was off, is told in a warning.

    Args:
        path: the Trainer's `output_dir`, the `sketches` directory in it, or the id of
            a dataset repository on the Hub.
        skip_damaged: leave out files that are missing or damaged, with a warning,
            instead of raising.
        verify: compare every byte with the digests that were written with it; by
            default this is done for stores of up to 1 GiB, and of larger ones only the
            lengths and the heads of the files are compared (`hf-sketch verify` does it
            all).
        hub_options: for `huggingface_hub.snapshot_download`, as `revision`, `token` or
            `repo_type="model"`.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a file is damaged, or the header is of another version or map.
    """
    directory = store_directory(path, **hub_options)
    header = read_header(directory)
    manifests = read_manifests(directory)
    _tell_what_is_missing(directory, manifests)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    if verify is None:
        verify = contents_are_checked(shards)
        if not verify:
            warnings.warn(
                f"{directory} holds {sum(s.size_bytes for s in shards) / 2**30:.1f} "
                "GiB, whose numbers are not compared with their digests on opening: "
                "pass verify=True to compare them, False to hear of it no more.",
                stacklevel=2,
            )
    damaged = _damaged(directory, shards, verify, skip_damaged)
    opened: dict[str, Dataset] = {}
    for kind in (PER_EXAMPLE, PER_STEP):
        whole = [s for s in shards_of(manifests, kind) if s.file not in damaged]
        columns = features(kind, header.model_sketch.out_size, header.row_dtype)
        opened[kind] = open_shards(directory, whole, columns)
    return Sketches(
        header.model_sketch,
        opened[PER_EXAMPLE],
        opened[PER_STEP],
        header.measured_error,
        directory,
    )


def _damaged(
    directory: Path, shards: Sequence[Shard], contents: bool, skip: bool
) -> set[str]:
    """The files that cannot be read, each with a warning; raises unless `skip`."""
    damaged: set[str] = set()
    for shard in shards:
        try:
            check_shard(directory, shard, contents)
        except ValueError as error:
            if not skip:
                raise
            damaged.add(shard.file)
            message = f"{shard.rows} rows left out: {error}"
            warnings.warn(message, stacklevel=3)
    return damaged


def _tell_what_is_missing(directory: Path, manifests: Sequence[Manifest]) -> None:
    """Warn of rows that the store should have."""
    if missing := missing_ranks(manifests):
        warnings.warn(
            f"{directory} has no rows of the processes {missing}: they died before they"
            " wrote any, or their files are on another machine; join them with "
            "hf-sketch merge.",
            stacklevel=3,
        )
    for manifest in manifests:
        for gap in manifest.gaps:
            warnings.warn(f"{directory} has no rows {gap}", stacklevel=3)
