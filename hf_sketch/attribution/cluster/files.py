"""The files of a store, as tasks on other machines open them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.shares import shared_rows
from hf_sketch.store.blocks import block_rows


@dataclass(frozen=True)
class StoreFiles:
    """The files of a store's rows as they were when the tasks were planned.

    A store that training still adds to is the same for all tasks.

    Args:
        files: their absolute paths, in the order of the rows.
        rows: number of rows in each.
        at_once: rows that are scored at once.
    """

    files: tuple[str, ...]
    rows: tuple[int, ...]
    at_once: int

    @classmethod
    def of_store(cls, store: GradientRows) -> "StoreFiles":
        """List the files behind the rows of `load_sketches`.

        Raises:
            ValueError: the rows are in memory, only a part of their files, or joined
                with other columns.
        """
        dataset = store.dataset
        found: Any = dataset.cache_files
        files = tuple(str(Path(file["filename"]).absolute()) for file in found)
        parts = [Dataset.from_file(file) for file in files]
        rows = tuple(map(len, parts))
        whole = store.recorded is None and sum(rows) == len(dataset)
        if not files or not whole:
            raise ValueError(
                f"Tasks read whole files, and these {len(dataset)} rows are not those "
                f"of {len(files)} files with {sum(rows)} rows. Pass the store as "
                "load_sketches returns it, without where or join."
            )
        return cls(files, rows, block_rows(dataset))

    @property
    def blocks(self) -> int:
        """Number of blocks, each of which one task reads."""
        return -(-sum(self.rows) // self.at_once)

    def part(self, number: int, count: int) -> tuple[list[str], range]:
        """Return the files of one of `count` parts, and its rows among theirs.

        Parts begin where blocks do, so that products are of the same blocks for any
        number of parts.
        """
        rows = shared_rows(sum(self.rows), self.at_once, number, count)
        ends = [*accumulate(self.rows)]
        starts = [0, *ends[:-1]]
        mine = [
            place
            for place, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start < rows.stop and rows.start < end
        ]
        first = starts[mine[0]]
        files = [self.files[place] for place in mine]
        return files, range(rows.start - first, rows.stop - first)


def rows_of_files(files: Sequence[str], rows: range | None = None) -> Dataset:
    """Return rows of Arrow files, memory-mapped.

    Args:
        files: in the order of the rows.
        rows: those to keep, counted from the first file's first; all by default.
    """
    dataset = concatenate_datasets([Dataset.from_file(file) for file in files])
    return dataset if rows is None else dataset.select(rows)
