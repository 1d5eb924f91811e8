"""Approximate search of a store's rows, by FAISS; needs the extra `faiss`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.methods import Method
from hf_sketch.attribution.scores import QueryMatrix, best_rows
from hf_sketch.attribution.shares import RowShare
from hf_sketch.store.blocks import row_blocks

_LISTS_A_ROOT = 4  # inverted lists, in units of the root of the number of rows
_TRAINED_A_LIST = 64
_PROBED = 16


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Rows of a store, ready for searches that look at some of them only.

    `GradientRows.build_index` makes one. It holds the rows in memory, in float32.

    Args:
        dataset: the rows.
        method: what scores are.
        index: FAISS index by inner product; `faiss.write_index` saves it.
        probed: lists that a search looks at.
    """

    dataset: Dataset
    method: Method
    index: Any
    probed: int

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find rows of the greatest scores.

        Shapes:
            queries (q, out_size) -> scores (q, top_k), row numbers (q, top_k), -1 where
            the searched lists run out of rows
        """
        self.index.nprobe = self.probed
        sketches = self.method.transform(queries).numpy()
        scores, rows = self.index.search(sketches, top_k)
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def recall(self, queries: Tensor, top_k: int) -> float:
        """Return the fraction of the exact top-k that a search finds, in [0, 1].

        Shapes:
            queries (q, out_size)
        """
        exact, _ = best_rows(
            RowShare(self.dataset), QueryMatrix((queries,)), self.method, top_k, 0
        )
        _, found = self.search(queries, top_k)
        hits = (exact.places.unsqueeze(2) == found.unsqueeze(1)).any(2)
        return float(hits.double().mean())


def index_rows(
    dataset: Dataset,
    scored_by: Callable[[], Method],
    lists: int | None,
    probed: int | None,
) -> RowIndex:
    """Put all finite rows into inverted lists, in two passes.

    Args:
        dataset: the rows.
        scored_by: returns what scores are; it may read all rows, so it is called last.
        lists: their number; None for the default.
        probed: lists that a search looks at; None for the default.

    Raises:
        ModuleNotFoundError: FAISS is not installed.
        ValueError: a number of lists is out of range.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "An index needs FAISS, which is not installed. Call pip install "
            '"hf-sketch[faiss]".'
        ) from error
    root = len(dataset) ** 0.5
    lists = lists or max(1, min(len(dataset), round(_LISTS_A_ROOT * root)))
    probed = min(_PROBED, lists) if probed is None else probed
    if not 1 <= probed <= lists <= len(dataset):
        raise ValueError(
            "probed must be in [1, lists], and lists at most the number of rows, got "
            f"{probed}, {lists} and {len(dataset)} rows: pass smaller ones."
        )
    method = scored_by()
    out_size: int = dataset.features["sketch"].length
    flat = faiss.IndexFlatIP(out_size)
    index = faiss.IndexIVFFlat(flat, out_size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # few rows are no reason to warn
    each = max(1, len(dataset) // (_TRAINED_A_LIST * lists))
    sample = [rows[::each] for _, rows in _finite_rows(dataset, method)]
    index.train(torch.cat(sample).numpy())
    for numbers, rows in _finite_rows(dataset, method):
        index.add_with_ids(rows.numpy(), numbers.numpy())
    return RowIndex(dataset, method, index, probed)


def _finite_rows(dataset: Dataset, method: Method) -> Any:
    """Numbers and weighted sketches of the finite rows, block by block."""
    for block in row_blocks(dataset, *method.columns):
        rows, weights = block.sketches, method.weights(block)
        rows = rows if weights is None else rows * weights.to(rows).unsqueeze(1)
        finite = rows.isfinite().all(1)
        numbers = torch.arange(block.start, block.start + len(rows))
        yield numbers[finite], rows[finite]
