"""Rows on their way to the disk: a thread makes files of them, another syncs those."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hf_sketch.durable import Draft, sync_directory
from hf_sketch.store.manifest import Manifest, write_manifest
from hf_sketch.store.rows import arrow_table, joined
from hf_sketch.store.shards import Shard, draft_shard

Rows = dict[str, list[Mapping[str, Tensor]]]


class ShardQueue:
    """Puts rows into the store in the background, in order.

    One thread makes files of rows while another syncs those of the rows before, renames
    them and lists them in the manifest. Every `put` and `flush` after a failure raises
    it again, and no later rows are listed, so the store has no hidden hole.

    Args:
        directory: the store.
        manifest: this process's manifest, as it is on the disk.
        row_dtype: dtype of stored sketches.
    """

    def __init__(self, directory: Path, manifest: Manifest, row_dtype: str) -> None:
        self.manifest = manifest
        self._directory = directory
        self._row_dtype = row_dtype
        self._next_number = manifest.next_number
        self._drafting = ThreadPoolExecutor(1, thread_name_prefix="hf-sketch-draft")
        self._naming = ThreadPoolExecutor(1, thread_name_prefix="hf-sketch-name")
        self._drafted: Future[None] = _done()
        self._named: Future[None] = _done()

    def put(self, rows: Rows) -> None:
        """Start to write rows of whole steps, once the rows before are in files.

        Raises:
            OSError: earlier rows could not be written.
        """
        self._drafted.result()
        if self._named.done():
            self._named.result()
        self._drafted = self._drafting.submit(self._draft, rows)

    def flush(self) -> None:
        """Wait until all rows are in the store.

        Raises:
            OSError: they could not be written.
        """
        self._drafted.result()
        self._named.result()

    def close(self) -> None:
        """Wait for what was started."""
        self._drafting.shutdown()
        self._naming.shutdown()

    def _draft(self, rows: Rows) -> None:
        """Make files of the rows, and name them after the files before."""
        drafts: list[tuple[Draft, Shard]] = []
        with ExitStack() as on_error:
            for kind in list(rows):
                draft, shard = self._draft_kind(kind, rows.pop(kind))
                on_error.callback(draft.discard)
                drafts.append((draft, shard))
            self._named.result()
            self._named = self._naming.submit(self._name, drafts)
            on_error.pop_all()

    def _draft_kind(
        self, kind: str, parts: list[Mapping[str, Tensor]]
    ) -> tuple[Draft, Shard]:
        """Make a file of rows, whose memory is free before it is written."""
        number, self._next_number = self._next_number, self._next_number + 1
        table = arrow_table(kind, joined(parts, self._row_dtype))
        parts.clear()
        return draft_shard(self._directory, kind, self.manifest.rank, number, table)

    def _name(self, drafts: list[tuple[Draft, Shard]]) -> None:
        """Sync and name the files, then list them in the manifest."""
        with ExitStack() as unfinished:
            for draft, _ in drafts:
                unfinished.callback(draft.discard)
            for draft, _ in drafts:
                draft.finish()
        # Their names are on the disk before a manifest has them.
        sync_directory(self._directory)
        shards = (*self.manifest.shards, *(shard for _, shard in drafts))
        manifest = replace(self.manifest, shards=shards)
        write_manifest(self._directory, manifest)
        self.manifest = manifest


def _done() -> Future[None]:
    """Return a future that has ended, for before the first one."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
