"""Adding rows to a store, step by step."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.store.header import Header, write_header
from hf_sketch.store.manifest import Gap, write_manifest
from hf_sketch.store.opening import open_store
from hf_sketch.store.queue import Rows, ShardQueue


class SketchWriter:
    """Buffers rows and writes them to shards of whole steps in the background.

    Each process has its own writer and its own files, so there is no lock. Rank 0 makes
    its writer first; on a file system that rank 0 does not reach, one process does.

    Args:
        directory: the store, `<output_dir>/sketches`.
        header: header of the rows that will be written.
        resume_step: the optimizer step that training resumes after. Rows of later steps
            are dropped, earlier ones are never touched. 0 for a new run: a store of an
            earlier run is renamed to `sketches-before-<n>`, with a warning.
        rank: rank of this process.
        world_size: number of processes.
        buffer_bytes: the most memory that rows take until they are written.

    Raises:
        ValueError: the store holds rows of other settings, or another number of
            processes resumes training with other examples per step.
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
    ) -> None:
        self.directory = directory
        kept = getattr(torch, header.row_dtype).itemsize / torch.float32.itemsize
        # New rows, the rows before them, and a copy of these in the stored dtype; once
        # those are gone, the copy and the file.
        self._part_bytes = buffer_bytes / (2 + kept)
        self._buffer: Rows = {}
        self._buffered_bytes = 0
        ours = replace(header, processes=world_size)
        self._header, own = open_store(directory, ours, resume_step, rank, world_size)
        self._queue = ShardQueue(directory, own, header.row_dtype)

    @property
    def measured_error(self) -> MeasuredError | None:
        """The measured error of the store's rows; None if it was not measured."""
        return self._header.measured_error

    @property
    def last_step(self) -> int:
        """The greatest step that has a row in the store; 0 for none."""
        return self._queue.manifest.last_step

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
            self._queue.flush()

    def close(self) -> None:
        """Wait for what is being written; rows that are not flushed are dropped."""
        self._queue.close()
        self._buffer, self._buffered_bytes = {}, 0

    def note_measured_error(self, error: MeasuredError) -> None:
        """Put the error of the rows, measured on examples, into the header."""
        self._header = replace(self._header, measured_error=error)
        write_header(self.directory, self._header)

    def note_gap(self, reason: str, last_step: int | None = None) -> None:
        """Drop the buffer, and note in the manifest that later rows are missing.

        Args:
            reason: why.
            last_step: the last step with rows in all processes; by default the last one
                with rows of this process.

        Raises:
            OSError: the manifest cannot be written.
        """
        self.close()
        first = 1 + (self.last_step if last_step is None else last_step)
        manifest = self._queue.manifest
        gaps = (*manifest.gaps, Gap(first, reason))
        write_manifest(self.directory, replace(manifest, gaps=gaps))

    def _start(self) -> None:
        """Hand the buffer to the threads."""
        with self._errors_explained():
            self._queue.put(self._buffer)
        self._buffer, self._buffered_bytes = {}, 0

    @contextmanager
    def _errors_explained(self) -> Generator[None]:
        """Say what an error of the threads means for the rows, and what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"Cannot write the rows after step {self.last_step} to {self.directory}"
                f" ({error.strerror}). Free disk space and resume from the last "
                "checkpoint, or set on_error='warn' to continue without recording.",
            ) from error
