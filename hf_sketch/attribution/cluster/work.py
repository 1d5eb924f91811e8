"""What tasks do with parts of a store's rows, and how their results are joined."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor

from hf_sketch.attribution.answers import answer_lines, answers, group_columns
from hf_sketch.attribution.cluster.files import rows_of_files
from hf_sketch.attribution.columns import EXAMPLE, row_groups
from hf_sketch.attribution.covariance import Moments, covariance
from hf_sketch.attribution.methods import Method
from hf_sketch.attribution.scores import (
    BestRows,
    QueryMatrix,
    best_places,
    group_sums,
)
from hf_sketch.attribution.shares import RowShare

_OF_QUERY: Final = ["query", "query_id", "rank", "score"]
_SUMS, _FINITE = "score_sums", "finite_rows"


class Work(ABC):
    """A pass over rows whose results on parts of them can be joined in any grouping."""

    @abstractmethod
    def of_rows(self, rows: Dataset) -> pa.Table:
        """The result on some rows alone."""

    @abstractmethod
    def joined(self, parts: Iterable[pa.Table]) -> pa.Table:
        """The result on the rows of several parts, which are given in order."""

    def finished(self, whole: pa.Table) -> pa.Table:
        """Return what is kept of the result on all rows."""
        return whole


@dataclass(frozen=True, eq=False)
class Question:
    """Queries, and how rows answer them.

    Shapes:
        ids (queries,)

    Args:
        ids: ids of the queries.
        queries: their sketches.
        method: what scores are.
        top: number of lines with the greatest scores.
        bottom: number of lines with the least scores.
    """

    ids: np.ndarray[Any, Any]
    queries: QueryMatrix
    method: Method
    top: int
    bottom: int = 0


def score_shards(
    files: Sequence[str],
    question: Question,
    groups: str | None = None,
    rows: range | None = None,
) -> pa.Table:
    """Return what some files of a store answer alone: the lines of `attribute`.

    It depends on nothing but its arguments. `Strongest.joined` makes the answer of all
    files out of those of each.

    Args:
        files: Arrow files of the store, in the order of the rows.
        question: the queries.
        groups: None, or "example_id" where no example has two rows in the store.
        rows: the rows to score, counted from the first file's first; all by default.
    """
    return Strongest(question, groups).of_rows(rows_of_files(files, rows))


@dataclass(frozen=True, eq=False)
class Strongest(Work):
    """The rows with the greatest and the least scores.

    Args:
        question: the queries.
        groups: None, or "example_id" where no example has two rows in the store.
    """

    question: Question
    groups: str | None = None

    def of_rows(self, rows: Dataset) -> pa.Table:
        asked = self.question
        counts = asked.top, asked.bottom
        options = asked.ids, asked.queries, asked.method, self.groups, counts
        return _table(answers(RowShare(rows), *options))

    def joined(self, parts: Iterable[pa.Table]) -> pa.Table:
        asked, queries = self.question, len(self.question.ids)
        best = worst = BestRows.none(queries)
        found: list[pa.Table] = []
        start = 0
        for part in parts:
            each = len(part) // queries
            scores = _numbers(part, "score").view(queries, each)
            places = torch.arange(start, start + len(part)).view(queries, each)
            top = int((_numbers(part, "rank")[:each] >= 0).sum())
            best = best.and_of(scores[:, :top], places[:, :top], asked.top)
            least, where = scores[:, top:].flip(1), places[:, top:].flip(1)
            worst = worst.and_of(-least, where, asked.bottom)
            found.append(part.drop_columns(_OF_QUERY))
            start += len(part)
        about = Dataset(InMemoryTable(pa.concat_tables(found)))
        return _table(answer_lines(asked.ids, best, worst, about))


@dataclass(frozen=True, eq=False)
class GroupSums(Work):
    """Sums of scores over groups of rows, such as those of one example.

    A part takes 8 bytes per query and group.

    Args:
        question: the queries.
        groups: the column of the groups' values.
    """

    question: Question
    groups: str

    def of_rows(self, rows: Dataset) -> pa.Table:
        asked, grouped = self.question, row_groups(rows, self.groups)
        sums, met = group_sums(RowShare(rows), asked.queries, asked.method, grouped)
        about = _table(group_columns(rows, self.groups, grouped))
        return _with_sums(about, sums, met)

    def joined(self, parts: Iterable[pa.Table]) -> pa.Table:
        every = pa.concat_tables(parts)
        values = every[self.groups].to_numpy()
        groups, codes = np.unique(values, return_inverse=True)
        last = np.zeros(len(groups), dtype=np.int64)
        last[codes] = np.arange(len(codes))  # the last one stays
        index, count = torch.from_numpy(codes), len(groups)
        sums, met = _sums(every)
        sums = sums.new_zeros(len(sums), count).index_add_(1, index, sums)
        met = met.new_zeros(count).index_add_(0, index, met)
        rows = torch.zeros(count, dtype=torch.int64)
        rows = rows.index_add_(0, index, _numbers(every, "rows")).numpy()
        about = every.take(last).drop_columns(["rows", _SUMS, _FINITE])
        return _with_sums(about.append_column("rows", pa.array(rows)), sums, met)

    def finished(self, whole: pa.Table) -> pa.Table:
        asked, (scores, met) = self.question, _sums(whole)
        if asked.method.averaged:
            scores = scores / met
        about = Dataset(InMemoryTable(whole.drop_columns([_SUMS, _FINITE])))
        found = best_places(scores, asked.top, asked.bottom)
        return _table(answer_lines(asked.ids, *found, about))


@dataclass(frozen=True)
class CovarianceSums(Work):
    """The sum of r r^T over finite rows r, and their number.

    Args:
        shape: shape of a row, see `covariance`.
    """

    shape: tuple[int, ...]

    def of_rows(self, rows: Dataset) -> pa.Table:
        return _moments_table(covariance(RowShare(rows), self.shape))

    def joined(self, parts: Iterable[pa.Table]) -> pa.Table:
        total = torch.zeros(*self.shape, self.shape[-1], dtype=torch.float64)
        count = 0
        for part in parts:
            moments = moments_of(part, self.shape)
            total += moments.total
            count += moments.count
        return _moments_table(Moments(total, count))


def moments_of(table: pa.Table, shape: Sequence[int]) -> Moments:
    """Return what `CovarianceSums` has put into a table."""
    flat = _flat(table["total"]).view(*shape, shape[-1])
    return Moments(flat, int(table.schema.metadata[b"count"]))


def work_of(
    question: Question, groups: str | None, dataset: Dataset, examples: int
) -> Work:
    """Return the pass that answers like `attribute`.

    Args:
        question: the queries.
        groups: see `attribute`.
        dataset: all rows.
        examples: number of different examples.
    """
    if groups == EXAMPLE and EXAMPLE not in dataset.column_names:
        groups = None
    if groups is None or (groups == EXAMPLE and examples == len(dataset)):
        return Strongest(question, groups)
    return GroupSums(question, groups)


def _moments_table(moments: Moments) -> pa.Table:
    total = _lists(moments.total.flatten(0, -2))
    table = pa.table({"total": total})
    return table.replace_schema_metadata({"count": str(moments.count)})


def _with_sums(about: pa.Table, sums: Tensor, met: Tensor) -> pa.Table:
    """Groups with their sums, (queries, groups), and numbers of finite rows."""
    about = about.append_column(_SUMS, _lists(sums.T.contiguous()))
    return about.append_column(_FINITE, pa.array(met.numpy()))


def _sums(table: pa.Table) -> tuple[Tensor, Tensor]:
    """Return the columns that `_with_sums` added."""
    flat = _flat(table[_SUMS])
    return flat.view(len(table), -1).T.contiguous(), _numbers(table, _FINITE)


def _table(dataset: Dataset) -> pa.Table:
    """A small dataset as an Arrow table."""
    table: Any = dataset.with_format("arrow")[:]
    return table.replace_schema_metadata()


def _lists(rows: Tensor) -> pa.Array:
    """A matrix as Arrow has it."""
    flat = pa.array(rows.reshape(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def _flat(column: pa.ChunkedArray) -> Tensor:
    """All numbers of a column of lists."""
    return torch.tensor(column.combine_chunks().flatten().to_numpy())


def _numbers(table: pa.Table, name: str) -> Tensor:
    """A column of numbers."""
    return torch.tensor(table[name].to_numpy())
