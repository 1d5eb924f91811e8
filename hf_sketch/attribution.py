"""Which rows of a store speak for or against a query."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.rows import decode

METHODS = ("dot", "cosine")
_CHUNK_ELEMENTS = 2**22
_QUERIES_AT_ONCE = 1024


def top_rows(
    dataset: Dataset, queries: Tensor, top_k: int, method: str, largest: bool
) -> tuple[Tensor, Tensor]:
    """The rows with the greatest (or least) scores, in one pass over the data.

    Memory does not grow with the number of rows: `top_k` of them are kept per query.
    Rows that are not finite are passed over, with a warning.

    Shapes:
        queries (q, out_size) -> scores (q, k), row numbers (q, k), best first;
        k = min(top_k, number of finite rows)

    Raises:
        ValueError: unknown method, or `top_k` below 1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}: pass 1 or more.")
    parts = [
        _top_rows(dataset, chunk, top_k, method, largest)
        for chunk in queries.split(_QUERIES_AT_ONCE)
    ]
    scores, rows = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if largest:
        return scores, rows
    return -scores, rows


def sketch_matrix(dataset: Dataset) -> Tensor:
    """The sketches of a (small) dataset as one matrix (rows, out_size), float32."""
    none = torch.empty(0, dataset.features["sketch"].length)
    return torch.cat([none, *(sketches for _, sketches in sketch_chunks(dataset))])


def _top_rows(
    dataset: Dataset, queries: Tensor, top_k: int, method: str, largest: bool
) -> tuple[Tensor, Tensor]:
    """`top_rows` for queries that fit in memory; scores negated for the least."""
    sign = 1.0 if largest else -1.0
    best = torch.empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64)
    queries = _normalised(queries) if method == "cosine" else queries
    skipped = 0
    total = tqdm(total=len(dataset), desc="Scoring rows", unit="row")
    for start, sketches in sketch_chunks(dataset):
        finite = sketches.isfinite().all(1)
        skipped += len(sketches) - int(finite.sum())
        rows = start + finite.nonzero().squeeze(1)
        kept = sketches[finite]
        kept = _normalised(kept) if method == "cosine" else kept
        best = torch.cat([best, sign * (queries @ kept.T)], 1)
        index = torch.cat([index, rows.expand(len(queries), -1)], 1)
        best, order = best.topk(min(top_k, best.shape[1]), dim=1)
        index = index.gather(1, order)
        total.update(len(sketches))
    total.close()
    if skipped:
        warnings.warn(
            f"{skipped} rows with a NaN or infinite gradient were passed over: they are"
            " those with finite=False in store.dataset.",
            stacklevel=4,
        )
    return best, index


def sketch_chunks(dataset: Dataset) -> Iterator[tuple[int, Tensor]]:
    """Runs of sketches: (number of the first row, (rows, out_size)), float32."""
    names = [name for name in ("scale", "sketch") if name in dataset.column_names]
    arrow = dataset.select_columns(names).with_format("arrow")
    start = 0
    out_size: int = dataset.features["sketch"].length
    chunk: Any
    for chunk in arrow.iter(max(1, _CHUNK_ELEMENTS // out_size)):
        sketches = _tensor(chunk["sketch"].combine_chunks().flatten())
        sketches = sketches.view(-1, out_size)
        if "scale" in names:
            sketches = decode(_tensor(chunk["scale"].combine_chunks()), sketches)
        yield start, sketches
        start += chunk.num_rows


def _tensor(array: Any) -> Tensor:
    """The numbers of an Arrow array."""
    return torch.tensor(array.to_numpy(zero_copy_only=False))


def _normalised(rows: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    return torch.nn.functional.normalize(rows, dim=1)
