"""The files of a store, as tasks on other machines open them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, concatenate_datasets
from fsspec.core import url_to_fs

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.shares import shared_rows
from hf_sketch.store.blocks import block_rows
from hf_sketch.store.locations import is_remote, store_url
from hf_sketch.store.log import read_manifests
from hf_sketch.store.shards import Shard, check_shard


@dataclass(frozen=True)
class StoreFiles:
    """The files of a store's rows as they were when the tasks were planned.

    A store that training still adds to is the same for all tasks.

    Args:
        root: the store's directory, an absolute path or a URL.
        shards: the files, in the order of the rows.
        at_once: rows that are scored at once.
    """

    root: str
    shards: tuple[Shard, ...]
    at_once: int

    @classmethod
    def of_store(cls, store: GradientRows, url: str | None = None) -> "StoreFiles":
        """List the files behind the rows of `load_sketches`.

        Args:
            store: the rows.
            url: where tasks copy the files from; None if all of them reach the store's
                directory.

        Raises:
            ValueError: the rows are in memory, only a part of their files, or joined
                with other columns.
        """
        found: Any = store.dataset.cache_files
        names = [Path(file["filename"]).name for file in found]
        shards: list[Shard] = []
        if store.directory is not None and store.recorded is None:
            listed = [s for m in read_manifests(store.directory) for s in m.shards]
            by_name = {shard.file: shard for shard in listed}
            shards = [by_name[name] for name in names if name in by_name]
        if store.directory is None or _rows(shards) != len(store.dataset):
            raise ValueError(
                f"Tasks read whole files, and these {len(store)} rows are not those of "
                f"{len(shards)} files with {_rows(shards)} rows. Pass the store as "
                "load_sketches returns it, without where or join."
            )
        root = str(store.directory.absolute()) if url is None else store_url(url)
        return cls(root, tuple(shards), block_rows(store.dataset))

    @property
    def blocks(self) -> int:
        """Number of blocks, each of which one task reads."""
        return -(-_rows(self.shards) // self.at_once)

    @contextmanager
    def part(self, number: int, count: int) -> Generator[Dataset]:
        """Open the rows of one of `count` parts, copied first if they are at a URL.

        Parts begin where blocks do, so that products are of the same blocks for any
        number of parts.

        Raises:
            ValueError: a file is missing, or was replaced since the tasks were planned.
        """
        rows = shared_rows(_rows(self.shards), self.at_once, number, count)
        ends = accumulate(shard.rows for shard in self.shards)
        mine = [
            (shard, end)
            for shard, end in zip(self.shards, ends, strict=True)
            if end - shard.rows < rows.stop and rows.start < end
        ]
        first = mine[0][1] - mine[0][0].rows
        with _local(self.root, [shard for shard, _ in mine]) as files:
            kept = range(rows.start - first, rows.stop - first)
            yield rows_of_files(files, kept)


def rows_of_files(files: Sequence[str], rows: range | None = None) -> Dataset:
    """Return rows of Arrow files, memory-mapped.

    Args:
        files: names of the files, in the order of the rows.
        rows: the rows to keep, counted from the first file's first; all by default.
    """
    dataset = concatenate_datasets([Dataset.from_file(file) for file in files])
    return dataset if rows is None else dataset.select(rows)


@contextmanager
def _local(root: str, shards: Sequence[Shard]) -> Generator[list[str]]:
    """The checked files on this machine; copies of those at a URL go at the end."""
    if not is_remote(root):
        yield _checked(Path(root), shards, contents=False)
        return
    system, place = url_to_fs(root)
    with TemporaryDirectory(prefix="hf_sketch-") as directory:
        names = [shard.file for shard in shards]
        copies = [f"{directory}/{name}" for name in names]
        system.get([f"{place}/{name}" for name in names], copies)
        yield _checked(Path(directory), shards, contents=True)


def _checked(directory: Path, shards: Sequence[Shard], contents: bool) -> list[str]:
    """The paths of files that are as they were written."""
    for shard in shards:
        check_shard(directory, shard, contents)
    return [str(directory / shard.file) for shard in shards]


def _rows(shards: Sequence[Shard]) -> int:
    """The number of rows in files."""
    return sum(shard.rows for shard in shards)
