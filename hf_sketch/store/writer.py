"""Adding rows to a store, step by step, and resuming it."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from hf_sketch.durable import set_aside
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.store.header import (
    HEADER,
    Gap,
    Header,
    Manifest,
    create_store,
    read_header,
    read_manifest,
    read_manifests,
    write_header,
    write_manifest,
    write_measured_error,
)
from hf_sketch.store.queue import Rows, ShardQueue
from hf_sketch.store.shards import read_shard, write_shard


class SketchWriter:
    """Buffers rows and writes them to shards of whole steps in the background.

    Every process has a writer of its own, and files of its own: there is no lock. The
    one of rank 0 makes the store, or drops its later rows, and is made first; on a file
    system that it does not reach, the first one there does.

    Args:
        directory: the store, `<output_dir>/sketches`.
        header: of the rows that will be written.
        resume_step: the optimizer step that training resumes after. Rows of later steps
            are dropped, earlier ones are never touched. 0 for a new run: a store of an
            earlier run is renamed to `sketches-before-<n>`, with a warning.
        rank: of this process.
        world_size: number of processes.
        buffer_bytes: the most memory that rows take before they are in files; a part
            of it at a time is written.

    Raises:
        ValueError: the store holds rows of other settings, or another number of
            processes resumes training in steps of other numbers of examples.
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
        # Rows that come, those that came before, and a copy of these as they are kept;
        # when those are gone, the copy and the file.
        self._part_bytes = buffer_bytes / (2 + kept)
        self._buffer: Rows = {}
        self._buffered_bytes = 0
        if resume_step and (directory / HEADER).exists():
            _check_step_examples(directory, header, world_size)
        if rank == 0 or not _is_prepared(directory, rank, resume_step):
            _prepare(directory, header, resume_step, rank)
            for manifest in read_manifests(directory):
                _truncate(directory, manifest, resume_step)
        manifest = _own_manifest(directory, rank, world_size)
        self._queue = ShardQueue(directory, manifest, header.row_dtype)
        self.measured_error = read_header(directory).measured_error

    def append(self, kind: str, columns: Mapping[str, Tensor]) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        columns = {name: column.detach().cpu() for name, column in columns.items()}
        self._buffer.setdefault(kind, []).append(columns)
        self._buffered_bytes += sum(column.nbytes for column in columns.values())

    def end_step(self) -> None:
        """Start to write if there is enough; a step's rows are all there now.

        Raises:
            OSError: what was started before could not be written.
        """
        if self._buffered_bytes >= self._part_bytes:
            self._start()

    def flush(self) -> None:
        """Write all buffered rows; they are in the store when this returns.

        Raises:
            OSError: they, or what was started before, could not be written.
        """
        if self._buffer:
            self._start()
        with self._errors_explained():
            self._queue.flush()

    def close(self) -> None:
        """Wait for what is being written; rows that are not flushed are dropped."""
        self._queue.close()

    def note_measured_error(self, error: MeasuredError) -> None:
        """Put the error of the rows, measured on examples, into the header."""
        self.measured_error = error
        write_measured_error(self.directory, error)

    @property
    def last_step(self) -> int:
        """The greatest step of which there is a row in the store; 0 for none."""
        return self._queue.manifest.last_step

    def note_gap(self, reason: str, last_step: int | None = None) -> None:
        """Drop the buffer, and say in the manifest that later rows are missing.

        Args:
            reason: why.
            last_step: of which there are rows in all processes; None for what this
                process knows.

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
        """Say what an error of the threads means for the rows, and what mends it."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"rows after step {self.last_step} cannot be written to "
                f"{self.directory} ({error.strerror}): make room there and resume from "
                "the last checkpoint, or train on without them by on_error='warn'",
            ) from error


def _is_prepared(directory: Path, rank: int, resume_step: int) -> bool:
    """Whether rank 0 was here: there is a store, without this process's later rows."""
    path = directory / Manifest(rank).file
    if not path.exists():
        return (directory / HEADER).exists()
    return read_manifest(path).last_step <= resume_step


def _prepare(directory: Path, header: Header, resume_step: int, rank: int) -> None:
    """Make the store, or check the one that rows are to be added to."""
    manifests: list[Manifest] = []
    if (directory / HEADER).exists():
        manifests = read_manifests(directory)
    last_step = max((manifest.last_step for manifest in manifests), default=0)
    recorded = any(manifest.shards or manifest.gaps for manifest in manifests)
    if last_step or (recorded and resume_step):
        _check_settings(directory, header)
    if last_step and resume_step == 0:
        aside = set_aside(directory)
        warnings.warn(
            f"{directory} held rows up to step {last_step} of an earlier run that is "
            f"not resumed: they are now in {aside}.",
            stacklevel=3,
        )
    if not recorded or resume_step == 0:
        create_store(directory, header, rank)
    elif header.step_examples is not None:
        theirs = read_header(directory)
        write_header(directory, replace(theirs, step_examples=header.step_examples))


def _own_manifest(directory: Path, rank: int, world_size: int) -> Manifest:
    """This process's manifest, from before or new."""
    new = Manifest(rank, world_size)
    path = directory / new.file
    manifest = read_manifest(path) if path.exists() else new
    manifest = replace(manifest, world_size=max(world_size, manifest.world_size))
    write_manifest(directory, manifest)
    return manifest


def _truncate(directory: Path, manifest: Manifest, last_step: int) -> None:
    """Drop the rows of steps after `last_step`."""
    later = [shard for shard in manifest.shards if shard.last_step > last_step]
    gaps = tuple(gap for gap in manifest.gaps if gap.first_step <= last_step)
    if not later and gaps == manifest.gaps:
        return
    kept = [shard for shard in manifest.shards if shard not in later]
    number = 1 + max((s.number for s in manifest.shards), default=0)
    for shard in later:
        if shard.first_step <= last_step:
            table = read_shard(directory, shard)
            earlier = pa.array(table["step"].to_numpy() <= last_step)
            arguments = (shard.kind, manifest.rank, number, table.filter(earlier))
            kept.append(write_shard(directory, *arguments))
            number += 1
    write_manifest(directory, replace(manifest, shards=tuple(kept), gaps=gaps))
    for shard in later:
        (directory / shard.file).unlink(missing_ok=True)


def _check_settings(directory: Path, header: Header) -> None:
    """Raise if the store's rows were made with other settings."""
    theirs = read_header(directory)
    notes = (header.measured_error, header.step_examples)
    if replace(theirs, measured_error=notes[0], step_examples=notes[1]) != header:
        raise ValueError(
            f"{directory} holds rows of {theirs.settings}, the callback was given "
            f"{header.settings}: pass the store's settings, or another output_dir."
        )


def _check_step_examples(directory: Path, header: Header, world_size: int) -> None:
    """Raise if other processes would pass over other examples than were trained.

    In as many processes as before a Trainer itself warns of other batches.
    """
    before = max((m.world_size for m in read_manifests(directory)), default=world_size)
    known = read_header(directory).step_examples
    if before != world_size and known not in (None, header.step_examples):
        raise ValueError(
            f"{directory} holds rows of {before} processes that took {known} examples "
            f"a step, got {world_size} that take {header.step_examples} to resume with,"
            " and would pass over other examples than were trained: resume with "
            f"{before}, or choose per_device_train_batch_size and "
            f"gradient_accumulation_steps so that a step takes {known}."
        )
