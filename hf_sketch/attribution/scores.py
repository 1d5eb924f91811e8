"""Scores of rows and queries, in one pass over a store that need not fit in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sketch.attribution.methods import Method
from hf_sketch.attribution.shares import RowShare
from hf_sketch.store.blocks import CPU, RowBlock

_QUERIES_AT_ONCE = 1024
_SUMS_AT_ONCE = 2**26


@dataclass(frozen=True, eq=False)
class QueryMatrix:
    """Sketches of queries, at one state of the model or at several.

    Shapes:
        each of `states` (queries, out_size); steps (states,), int64, ascending

    Args:
        states: the sketches at each.
        steps: optimizer steps that were made before each; None for one state.
    """

    states: tuple[Tensor, ...]
    steps: Tensor | None = None

    def split(self, size: int) -> "list[QueryMatrix]":
        """Split the queries into parts of `size`."""
        parts = zip(*(state.split(size) for state in self.states), strict=True)
        return [QueryMatrix(part, self.steps) for part in parts]

    def transformed(self, method: Method) -> "QueryMatrix":
        """Return the queries ready to be multiplied with rows."""
        states = tuple(method.transform(state) for state in self.states)
        return QueryMatrix(states, self.steps)

    def to(self, device: torch.device) -> "QueryMatrix":
        """Return the queries on a device."""
        states = tuple(state.to(device) for state in self.states)
        return QueryMatrix(states, self.steps)

    def times(self, block: RowBlock) -> Tensor:
        """Inner products with rows, (queries, rows), without the rows' scale.

        A row meets the queries of the state that is nearest to its own: that which its
        optimizer step began with, if training recorded it, or that of its `step`.
        """
        if self.steps is None:
            return (block.kept @ self.states[0].T).T.contiguous()  # quicker so
        made = block.columns["step"] - int("weight" in block.columns)
        nearest = (made.unsqueeze(1) - self.steps).abs().argmin(1)
        shape = len(self.states[0]), len(block.kept)
        products = block.kept.new_empty(shape)
        for state in nearest.unique().tolist():
            rows = (nearest == state).nonzero().squeeze(1)
            products[:, rows] = self.states[state] @ block.kept[rows].T
        return products


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows, grouped by a column.

    Shapes:
        codes (rows,), int64: which of the values each row has

    Args:
        values: the column's different values, sorted.
    """

    values: np.ndarray[Any, Any]
    codes: Tensor

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(self.values)


@dataclass(frozen=True, eq=False)
class BestRows:
    """The strongest of the rows (or groups), greatest score first.

    Shapes:
        scores, places (queries, kept)
    """

    scores: Tensor
    places: Tensor

    @classmethod
    def none(cls, queries: int, device: torch.device = CPU) -> "BestRows":
        """Return an empty list for each query."""
        scores = torch.empty(queries, 0, device=device)
        return cls(scores, scores.long())

    def and_of(self, scores: Tensor, places: Tensor, count: int) -> "BestRows":
        """Return the best `count` of these and of later rows."""
        if count == 0:
            return self
        rows: Any = slice(None)
        if self.scores.shape[1] == count and scores.shape[1]:
            better = scores.amax(1) > self.scores[:, -1]  # of equal ones the first
            if not bool(better.any()):
                return self
            if not bool(better.all()):
                rows = better.nonzero().squeeze(1)
        both = torch.cat([self.scores[rows], scores[rows]], 1)
        best, order = _topk(both, min(count, both.shape[1]))
        places = places.expand(len(scores), -1)[rows]
        places = torch.cat([self.places[rows], places], 1).gather(1, order)
        if isinstance(rows, slice):
            return BestRows(best, places)
        return BestRows(
            self.scores.index_copy(0, rows, best),
            self.places.index_copy(0, rows, places),
        )

    def of_all(self, share: RowShare, count: int) -> "BestRows":
        """Return the best `count` of all processes, on the CPU."""
        best, *others = share.gathered(BestRows(self.scores.cpu(), self.places.cpu()))
        for other in others:
            best = best.and_of(other.scores, other.places, count)
        return best

    @staticmethod
    def joined(parts: "Sequence[BestRows]") -> "BestRows":
        """Return the lists of all queries as one."""
        scores = torch.cat([part.scores for part in parts])
        return BestRows(scores, torch.cat([part.places for part in parts]))


def best_rows(
    share: RowShare, queries: QueryMatrix, method: Method, top: int, bottom: int
) -> tuple[BestRows, BestRows]:
    """The rows of the greatest and of the least scores (these first, and negated).

    Memory does not grow with the number of rows.
    """
    found: list[tuple[BestRows, BestRows]] = []
    for part in queries.split(_QUERIES_AT_ONCE):
        best = worst = BestRows.none(len(part.states[0]), share.device)
        for scores, rows in score_blocks(share, part, method):
            best = best.and_of(scores, rows, top)
            worst = worst.and_of(-scores, rows, bottom)
        found.append((best.of_all(share, top), worst.of_all(share, bottom)))
    best, worst = map(BestRows.joined, zip(*found, strict=True))
    return best, worst


def best_groups(
    share: RowShare,
    queries: QueryMatrix,
    method: Method,
    groups: "RowGroups",
    top: int,
    bottom: int,
) -> tuple[BestRows, BestRows]:
    """The groups of the greatest and of the least scores (these first, and negated).

    Scores of all groups are held for as many queries as fit into 512 MiB, at least one.
    """
    found: list[tuple[BestRows, BestRows]] = []
    for part in queries.split(max(1, _SUMS_AT_ONCE // max(1, groups.count))):
        scores = group_scores(share, part, method, groups)
        found.append(best_places(scores, top, bottom))
    best, worst = map(BestRows.joined, zip(*found, strict=True))
    return best, worst


def best_places(scores: Tensor, top: int, bottom: int) -> tuple[BestRows, BestRows]:
    """Return where the greatest scores are, and the least (least first, negated).

    Means over no finite row, which are NaN, are passed over.

    Shapes:
        scores (queries, n)
    """
    places = scores.isnan().all(0).logical_not().nonzero().squeeze(1)
    scores, none = scores[:, places], BestRows.none(len(scores))
    return none.and_of(scores, places, top), none.and_of(-scores, places, bottom)


def dense_scores(share: RowShare, queries: QueryMatrix, method: Method) -> Tensor:
    """All scores, (queries, rows), float32; NaN for rows that are not finite."""
    scores = torch.full((len(queries.states[0]), len(share.dataset)), torch.nan)
    for part, rows in score_blocks(share, queries, method):
        scores[:, rows.cpu()] = part.cpu()
    return torch.cat(share.gathered(scores[:, share.rows.start : share.rows.stop]), 1)


def group_scores(
    share: RowShare, queries: QueryMatrix, method: Method, groups: "RowGroups"
) -> Tensor:
    """Sums, or means, over the finite rows of each group, (queries, groups), float64.

    A mean over no rows is NaN.
    """
    sums, rows_met = group_sums(share, queries, method, groups)
    return sums / rows_met if method.averaged else sums


def group_sums(
    share: RowShare, queries: QueryMatrix, method: Method, groups: "RowGroups"
) -> tuple[Tensor, Tensor]:
    """Sums over the finite rows of each group, and their numbers.

    Shapes:
        -> (queries, groups), (groups,), float64
    """
    shape = len(queries.states[0]), groups.count
    sums = torch.zeros(shape, dtype=torch.float64, device=share.device)
    rows_met = torch.zeros(groups.count, dtype=torch.float64)
    for scores, rows in score_blocks(share, queries, method):
        codes = groups.codes[rows.cpu()]
        sums.index_add_(1, codes.to(sums.device), scores.double())
        rows_met += torch.bincount(codes, minlength=groups.count)
    return share.summed(sums).cpu(), share.summed(rows_met)


def self_scores(share: RowShare, method: Method) -> Tensor:
    """Each row's score as its own query, (rows,), float32; NaN if not finite."""
    parts = [torch.empty(0)]
    for block in replace(share, device=CPU).blocks(method):
        sketches, weights = block.sketches, method.weights(block)
        own = (method.transform(sketches) * sketches).sum(1)
        parts.append(own if weights is None else own * weights)
    return torch.cat(share.gathered(torch.cat(parts)))


def score_blocks(
    share: RowShare, queries: QueryMatrix, method: Method
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (queries, n) and row numbers (n,) of finite rows, in order, on a device.

    Rows that are not finite are passed over, with a warning when all are read.
    """
    queries = queries.transformed(method).to(share.device)
    skipped = 0
    for block in share.blocks(method):
        weights = method.weights(block)
        scale = block.scale
        if weights is not None:
            scale = scale * weights.to(scale.device)
        scores = queries.times(block).mul_(scale)
        end = block.start + len(block.kept)
        rows = torch.arange(block.start, end, device=scores.device)
        if not bool(scores.sum().isfinite()):  # quicker than to look at each
            finite = scores.isfinite().all(0)
            scores, rows = scores[:, finite], rows[finite]
            skipped += len(finite) - len(rows)
        yield scores, rows
    share.tell_skipped(skipped)


def _topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest of each row and where they are; of equal ones, the first.

    torch.topk takes any of equal ones, which would depend on the rows beside them.
    """
    best, places = scores.topk(count, dim=1)
    least = best[:, -1:]
    if int((scores == least).sum()) > int((best == least).sum()):
        best, places = scores.sort(dim=1, descending=True, stable=True)
        return best[:, :count], places[:, :count]
    places = places.sort(dim=1).values
    best, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return best, places.gather(1, order)
