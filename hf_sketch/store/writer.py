"""Adding rows to a store, step by step."""

import errno
import itertools
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sketch.durable import Draft, sync_directory
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.store.compaction import (
    LEAST_BYTES,
    is_many,
    join,
    newest_files,
    put_in_place,
    small_files,
)
from hf_sketch.store.header import Header, write_header
from hf_sketch.store.lock import take_lock
from hf_sketch.store.log import mark_full
from hf_sketch.store.manifest import Gap
from hf_sketch.store.opening import open_store
from hf_sketch.store.rows import arrow_table, joined, kept_dtype
from hf_sketch.store.shards import Shard, draft_shard

_Rows = dict[str, list[Mapping[str, Tensor]]]


class SketchWriter:
    """Buffers rows and writes them to shards of whole steps in the background.

    One thread makes files of rows while another syncs those of the rows before, renames
    them and lists them in the manifest. Every `end_step` that writes and every `flush`
    after a failure raises it again, and no later rows are listed, so the store has no
    hidden hole.

    Each process has its own writer and its own files, which it locks until `close`.
    Rank 0 makes its writer first; on a file system that rank 0 does not reach, one
    process does.

    Args:
        directory: the store, `<output_dir>/sketches`.
        header: header of the rows that will be written.
        resume_step: the optimizer step that training resumes after. Rows of later steps
            are dropped, earlier ones are never touched. 0 for a new run: a store of an
            earlier run is renamed to `sketches-before-<n>`, with a warning.
        rank: rank of this process.
        world_size: number of processes.
        buffer_bytes: the most memory that rows take until they are written.
        file_bytes: length from which a file stays; shorter ones are joined.

    Raises:
        ValueError: the store holds rows of other settings, another run writes to it, or
            another number of processes resumes training with other examples per step.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        header: Header,
        resume_step: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        buffer_bytes: int = 64 * 2**20,
        file_bytes: int = LEAST_BYTES,
    ) -> None:
        self.directory = directory
        self._file_bytes = file_bytes
        kept = getattr(torch, header.row_dtype).itemsize / torch.float32.itemsize
        # New rows, the rows before them, and a copy of these in the stored dtype.
        self._part_bytes = buffer_bytes / (2 + kept)
        self._buffer: _Rows = {}
        self._buffered_bytes = 0
        ours = replace(header, processes=world_size)
        self._rank = rank
        with ExitStack() as on_error:
            self._lock = take_lock(directory, rank, from_afar=True)
            on_error.callback(self._lock.release)
            self._header, self._log = open_store(
                directory, ours, resume_step, rank, world_size
            )
            on_error.pop_all()
        self._numbers = itertools.count(self._log.manifest.next_number)
        self._joins = True
        # The first drafts, the second names: at most one of either runs at a time.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="hf-sketch-writer")
        self._drafted: Future[None] = _done()
        self._named: Future[None] = _done()

    @property
    def measured_error(self) -> MeasuredError | None:
        """The measured error of the store's rows; None if it was not measured."""
        return self._header.measured_error

    @property
    def has_answers(self) -> bool:
        """Whether rows have the columns of generated answers."""
        return self._header.answers

    @property
    def last_step(self) -> int:
        """The greatest step that has a row in the store; 0 for none."""
        return self._log.manifest.last_step

    def append(self, kind: str, columns: Mapping[str, Tensor]) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        columns = {name: column.detach().cpu() for name, column in columns.items()}
        self._buffer.setdefault(kind, []).append(columns)
        self._buffered_bytes += sum(column.nbytes for column in columns.values())

    def end_step(self) -> None:
        """Note that a step's rows are complete, and start writing if there are enough.

        Raises:
            OSError: earlier rows could not be written.
        """
        if self._buffered_bytes >= self._part_bytes:
            self._start()

    def flush(self) -> None:
        """Write all buffered rows; they are in the store when this returns.

        Raises:
            OSError: they, or earlier rows, could not be written.
        """
        if self._buffer:
            self._start()
        with self._errors_explained():
            self._drafted.result()
            self._named.result()

    def join_files(self) -> None:
        """Join the small files of each kind, once all rows are written.

        After `close` it does nothing.
        """
        groups = small_files(self._log.manifest, self._file_bytes)
        if self._joins and is_many(groups):
            self._threads.submit(self._join, groups).result()

    def close(self) -> None:
        """Wait for what is being written; rows that are not flushed are dropped.

        Then another writer may follow.
        """
        wait([self._drafted])  # which starts the naming
        self._threads.shutdown()
        self._lock.release()
        self._buffer, self._buffered_bytes = {}, 0
        self._joins = False

    def note(self, **fields: Any) -> None:
        """Put into the header, in one process, what was found out about the rows.

        What is None was not found out.
        """
        found = {name: x for name, x in fields.items() if x is not None}
        known = all(getattr(self._header, name) == x for name, x in found.items())
        if self._rank == 0 and not known:
            self._header = replace(self._header, **found)
            write_header(self.directory, self._header)

    def note_gap(self, reason: str, last_step: int | None = None) -> None:
        """Drop the buffer, and note in the manifest that later rows are missing.

        Args:
            reason: why.
            last_step: the last step with rows in all processes; by default the last one
                with rows of this process.

        Raises:
            OSError: nothing can be written, not even that the disk is full.
        """
        self.close()
        first = 1 + (self.last_step if last_step is None else last_step)
        try:
            self._log = self._log.append(self.directory, gaps=[Gap(first, reason)])
        except OSError:
            mark_full(self.directory, self._rank)

    def _start(self) -> None:
        """Hand the buffer to the threads, once the rows before are in files."""
        with self._errors_explained():
            self._drafted.result()
            if self._named.done():
                self._named.result()
        self._drafted = self._threads.submit(self._draft, self._buffer)
        self._buffer, self._buffered_bytes = {}, 0

    def _draft(self, rows: _Rows) -> None:
        """Make files of the rows, and name them after the files before."""
        drafts: list[tuple[Draft, Shard]] = []
        with ExitStack() as on_error:
            for kind in list(rows):
                draft, shard = self._draft_kind(kind, rows.pop(kind))
                on_error.callback(draft.discard)
                drafts.append((draft, shard))
            self._named.result()
            self._named = self._threads.submit(self._name, drafts)
            on_error.pop_all()

    def _draft_kind(
        self, kind: str, parts: list[Mapping[str, Tensor]]
    ) -> tuple[Draft, Shard]:
        """Make a file of rows, whose memory is free before it is written."""
        groups = self._header.model_sketch.layer_groups.count
        rows = joined(parts, kept_dtype(kind, self._header.row_dtype), groups)
        table = arrow_table(kind, rows)
        parts.clear()
        number = next(self._numbers)
        return draft_shard(self.directory, kind, self._rank, number, table)

    def _name(self, drafts: list[tuple[Draft, Shard]]) -> None:
        """Sync and name the files, then list them in the manifest."""
        with ExitStack() as unfinished:
            for draft, _ in drafts:
                unfinished.callback(draft.discard)
            self._lock.check()
            for draft, _ in drafts:
                draft.finish()
        # Their names are on the disk before a manifest has them.
        sync_directory(self.directory)
        shards = [shard for _, shard in drafts]
        self._log = self._log.append(self.directory, shards)
        for shard in shards:
            newest = newest_files(self._log.manifest, shard.kind, self._file_bytes)
            self._join([newest])

    def _join(self, groups: Sequence[Sequence[Shard]]) -> None:
        """Let files become one each; where that fails, they stay as they are."""
        for group in filter(None, groups):
            size = sum(shard.size_bytes for shard in group)
            if not self._joins or shutil.disk_usage(self.directory).free < 4 * size:
                return  # the room is for rows
            try:
                joined = join(self.directory, group, next(self._numbers))
                with ExitStack() as unfinished:
                    unfinished.callback(joined[0].discard)
                    self._lock.check()
                    self._log = put_in_place(self.directory, self._log, *joined)
            except (OSError, ValueError) as error:
                self._joins = False
                warnings.warn(
                    f"The files of {self.directory} stay small, as they cannot be "
                    f"joined: {error}",
                    stacklevel=2,
                )

    @contextmanager
    def _errors_explained(self) -> Generator[None]:
        """Say what an error of the threads means for the rows, and what to do."""
        try:
            yield
        except OSError as error:
            advice = "Free disk space and resume from the last checkpoint"
            if error.errno == errno.EBUSY:
                advice = "Pass another output_dir"
            raise OSError(
                error.errno,
                f"Cannot write the rows after step {self.last_step} to {self.directory}"
                f" ({error.strerror}). {advice}, or set on_error='warn' to continue "
                "without recording.",
            ) from error


def _done() -> Future[None]:
    """Return a future that has ended, for before the first one."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
