"""How many bytes rows take on disk, by arithmetic alone."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import pyarrow as pa
import torch
from datasets import Features

from hf_sketch.store.compaction import LEAST_BYTES, MOST_FILES, is_many
from hf_sketch.store.log import entry_bytes
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, arrow_table, features, joined
from hf_sketch.store.shards import Shard

BUFFER_BYTES: Final = 64 * 2**20  # what SketchWriter holds by default
_ALIGNMENT: Final = 8  # of a column's bytes in an Arrow file
_DIGEST: Final = "0" * 32


@dataclass(frozen=True)
class RowFormat:
    """A kind of rows, as it is kept on disk.

    Args:
        kind: "per_example", "per_step" or "update".
        out_size: numbers in a row.
        row_dtype: what they are kept in: "float32", "float16" or "int8".
        groups: groups of layers in a row, of which each has a scale.
    """

    kind: str
    out_size: int
    row_dtype: str = "float32"
    groups: int = 1

    @property
    def row_bytes(self) -> float:
        """Bytes of one row with its columns; `finite` takes an eighth of a byte."""
        return sum(self._widths())

    @property
    def buffered_bytes(self) -> int:
        """Bytes of one row in memory until it is written."""
        return _BUFFERED[self.kind] + self.out_size * torch.float32.itemsize

    def file_bytes(self, rows: int) -> int:
        """Return the bytes of an Arrow file with `rows` rows."""
        return self._head_bytes() + self._body_bytes(rows)

    def _body_bytes(self, rows: int) -> int:
        """Return the bytes of its columns, each padded to the alignment."""
        parts = (math.ceil(rows * width / _ALIGNMENT) for width in self._widths())
        return _ALIGNMENT * sum(parts)

    def _head_bytes(self) -> int:
        """Return the bytes of the rest of the file, the same for any number of rows."""
        names = self._features()
        columns = {n: torch.zeros(1) for n in names if n not in ("scale", "sketch")}
        columns["sketch"] = torch.zeros(1, self.out_size)
        rows = joined([columns], self.row_dtype, self.groups)
        table = arrow_table(self.kind, rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().size - self._body_bytes(1)

    def _widths(self) -> list[float]:
        """Bytes of each column in a row."""
        schema = self._features().arrow_schema
        return [_bits(field.type) / 8 for field in schema]

    def _features(self) -> Features:
        settings = self.out_size, self.row_dtype, (), self.groups
        return features(self.kind, *settings)


# Columns beside the sketch, in the tensors that the callbacks make.
_BUFFERED: Final = {PER_EXAMPLE: 61, PER_STEP: 33}


@dataclass(frozen=True)
class StoreSize:
    """What a recorded run leaves on disk.

    Args:
        rows: number of rows of examples, over all ranks.
        row_bytes: bytes per row.
        step_rows: number of rows of steps.
        files: Arrow files.
        files_a_rank: number of files of the rank that has most.
        total_bytes: bytes of all files.
        manifest_bytes: bytes of the largest manifest at the end.
    """

    rows: int
    row_bytes: float
    step_rows: int
    files: int
    files_a_rank: int
    total_bytes: int
    manifest_bytes: int


def store_size(
    examples: RowFormat,
    *,
    rows_a_step: int,
    steps: int,
    per_step: bool,
    ranks: int,
    flush_steps: int | None = None,
    file_bytes: int = LEAST_BYTES,
) -> StoreSize:
    """The size of a store, less its header.

    Args:
        examples: their rows' format.
        rows_a_step: examples of one rank in a step.
        steps: number of recorded steps.
        per_step: whether the first rank writes a row for each step, too.
        ranks: number of ranks that write.
        flush_steps: recorded steps between two checkpoints, which end a file.
        file_bytes: length from which a file stays; shorter ones are joined.
    """
    kinds = [(examples, rows_a_step)]
    if per_step:
        kinds.append((replace(examples, kind=PER_STEP), 1))
    cuts = steps, flush_steps, file_bytes
    own, own_bytes = _rank_files(kinds, *cuts)
    others, others_bytes = _rank_files(kinds[:1], *cuts)
    files = own + (ranks - 1) * others
    entry = _bytes_per_file([kind.kind for kind, _ in kinds])
    alone = _bytes_per_file([examples.kind])
    return StoreSize(
        rows=rows_a_step * steps * ranks,
        row_bytes=examples.row_bytes,
        step_rows=steps if per_step else 0,
        files=files,
        files_a_rank=own,
        total_bytes=own_bytes
        + own * entry
        + (ranks - 1) * (others_bytes + others * alone),
        manifest_bytes=own * entry,
    )


def _rank_files(
    kinds: list[tuple[RowFormat, int]],
    steps: int,
    flush_steps: int | None,
    file_bytes: int,
) -> tuple[int, int]:
    """Count one rank's files, as SketchWriter cuts and joins them, and their bytes."""
    kept = getattr(torch, kinds[0][0].row_dtype).itemsize / torch.float32.itemsize
    a_step = sum(rows * kind.buffered_bytes for kind, rows in kinds)
    at_once = math.ceil(BUFFER_BYTES / (2 + kept) / a_step)
    files = [_Files(kind, rows, file_bytes) for kind, rows in kinds]
    interval = flush_steps or steps
    for start in range(0, steps, interval):
        end = min(start + interval, steps)
        for low in range(start, end, at_once):
            for one in files:
                one.flush(min(at_once, end - low))
    small = [one.small for one in files]
    if is_many(small):
        for one in files:
            one.join(len(one.small))
    sizes = [size for one in files for size in one.sizes]
    return len(sizes), sum(sizes)


@dataclass
class _Files:
    """A rank's files of one kind.

    Args:
        kind: format of their rows.
        rows_a_step: rows of each step.
        least_bytes: length from which a file stays as it is.
        large: bytes of each of these.
        small: rows of the others.
        small_bytes: theirs.
        tiny: how many of the last ones are so short that only their number counts.
    """

    kind: RowFormat
    rows_a_step: int
    least_bytes: int
    large: list[int] = field(default_factory=list[int])
    small: list[int] = field(default_factory=list[int])
    small_bytes: int = 0
    tiny: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of all of them."""
        return [*self.large, *(_file_bytes(self.kind, rows) for rows in self.small)]

    def flush(self, steps: int) -> None:
        """Add a file, and join it with others as `newest_files` does."""
        self._add(steps * self.rows_a_step)
        if self.small_bytes >= self.least_bytes:
            self.join(len(self.small))
        elif self.tiny == MOST_FILES:
            self.join(MOST_FILES)

    def join(self, count: int) -> None:
        """Let the last small files become one."""
        rows = self.small[-count:]
        del self.small[-count:]
        self.small_bytes -= sum(_file_bytes(self.kind, one) for one in rows)
        self.tiny = 0
        self._add(sum(rows))

    def _add(self, rows: int) -> None:
        size = _file_bytes(self.kind, rows)
        if size >= self.least_bytes:
            self.large.append(size)
            return
        self.small.append(rows)
        self.small_bytes += size
        self.tiny = self.tiny + 1 if size < self.least_bytes / MOST_FILES else 0


@lru_cache(maxsize=64)
def _file_bytes(kind: RowFormat, rows: int) -> int:
    return kind.file_bytes(rows)


def _bytes_per_file(kinds: list[str]) -> int:
    """Return a file's part of the manifest's entry for a flush, in bytes."""
    rest = 1000, 10**6, 10**6, 10**7, 1000, _DIGEST, _DIGEST
    shards = [Shard(f"{kind}-00000-000001.arrow", kind, *rest) for kind in kinds]
    return round(entry_bytes(shards) / len(kinds))


def _bits(kind: pa.DataType) -> int:
    """Return the bits of one value of an Arrow type."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _bits(kind.value_type)
    return kind.bit_width
