"""Adding rows to a store, step by step, and resuming it."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from hf_sketch.measured_error import MeasuredError
from hf_sketch.model_sketch import ModelSketch
from hf_sketch.store import (
    HEADER,
    MANIFEST,
    Shard,
    arrow_table,
    create_store,
    read_header,
    read_manifest,
    read_shard,
    write_manifest,
    write_measured_error,
    write_shard,
)


class SketchWriter:
    """Buffers rows and flushes them to shards of whole steps.

    Args:
        directory: the store, `<output_dir>/sketches`.
        model_sketch: the map that makes the rows.
        loss: a row's units: the "mean" or the "sum" over its example's tokens.
        resume_step: the optimizer step that training resumes after. Rows of later steps
            are dropped, earlier ones are never touched. 0 for a new run: a store of an
            earlier run is renamed to `sketches-before-<n>`, with a warning.
        buffer_bytes: rows are flushed at the end of a step once they fill this much.

    Raises:
        ValueError: the store holds rows of another map.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        model_sketch: ModelSketch,
        loss: str = "mean",
        resume_step: int = 0,
        buffer_bytes: int = 64 * 2**20,
    ) -> None:
        self.directory = directory
        self.buffer_bytes = buffer_bytes
        self._buffer: dict[str, list[Mapping[str, Tensor]]] = {}
        self._buffered_bytes = 0
        self._shards = _open_shards(directory, model_sketch, loss, resume_step)
        self.measured_error = read_header(directory).measured_error
        self._next_number = 1 + max(
            (_number(shard) for shard in self._shards), default=0
        )
        self._truncate(resume_step)

    def append(self, kind: str, columns: Mapping[str, Tensor]) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        columns = {name: column.detach().cpu() for name, column in columns.items()}
        self._buffer.setdefault(kind, []).append(columns)
        self._buffered_bytes += sum(column.nbytes for column in columns.values())

    def end_step(self) -> None:
        """Flush if the buffer is full."""
        if self._buffered_bytes >= self.buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Write all buffered rows; they are in the store when this returns."""
        if not self._buffer:
            return
        for kind, parts in self._buffer.items():
            columns = {
                name: torch.cat([part[name] for part in parts]) for name in parts[0]
            }
            self._write(kind, arrow_table(kind, columns))
        write_manifest(self.directory, self._shards)
        self._buffer = {}
        self._buffered_bytes = 0

    def note_measured_error(self, error: MeasuredError) -> None:
        """Put the error of the rows, measured on examples, into the header."""
        self.measured_error = error
        write_measured_error(self.directory, error)

    def _write(self, kind: str, table: pa.Table) -> None:
        shard = write_shard(self.directory, kind, self._next_number, table)
        self._shards.append(shard)
        self._next_number += 1

    def _truncate(self, last_step: int) -> None:
        """Drop the rows of steps after `last_step`."""
        later = [shard for shard in self._shards if shard.last_step > last_step]
        if not later:
            return
        self._shards = [shard for shard in self._shards if shard not in later]
        for shard in later:
            if shard.first_step <= last_step:
                table = read_shard(self.directory, shard)
                kept = table["step"].to_numpy() <= last_step
                self._write(shard.kind, table.filter(pa.array(kept)))
        write_manifest(self.directory, self._shards)
        for shard in later:
            (self.directory / shard.file).unlink(missing_ok=True)


def _open_shards(
    directory: Path, model_sketch: ModelSketch, loss: str, resume_step: int
) -> list[Shard]:
    """The shards of the store that rows are to be added to; makes it if need be."""
    files = (directory / HEADER, directory / MANIFEST)
    shards = read_manifest(directory) if all(f.exists() for f in files) else []
    if shards:
        _check_settings(directory, model_sketch, loss)
    if shards and resume_step == 0:
        last = max(shard.last_step for shard in shards)
        aside = _set_aside(directory)
        warnings.warn(
            f"{directory} held rows up to step {last} of an earlier run that is not "
            f"resumed: they are now in {aside}.",
            stacklevel=2,
        )
        shards = []
    if not shards:
        create_store(directory, model_sketch, loss)
    return shards


def _check_settings(directory: Path, model_sketch: ModelSketch, loss: str) -> None:
    """Raise if the store's rows were made by another map, or of another loss."""
    header = read_header(directory)
    if header.model_sketch != model_sketch or header.loss != loss:
        raise ValueError(
            f"{directory} holds rows of {_settings(header.model_sketch, header.loss)}, "
            f"the callback was given {_settings(model_sketch, loss)}: pass the store's "
            "settings, or another output_dir."
        )


def _set_aside(directory: Path) -> Path:
    """Rename the store to the first free name."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}-before-{number}")).exists():
        number += 1
    return directory.rename(aside)


def _settings(model_sketch: ModelSketch, loss: str) -> str:
    """The settings of a sketch, on one line."""
    count = len(model_sketch.shapes)
    return (
        f"out_size={model_sketch.out_size}, layout={model_sketch.layout!r}, "
        f"operator={model_sketch.operator!r}, "
        f"seed={model_sketch.seed}, loss={loss!r}, "
        f"{count} parameters, {model_sketch.in_size} elements"
    )


def _number(shard: Shard) -> int:
    """The running number in a shard's file name."""
    return int(Path(shard.file).stem.rsplit("-", 1)[1])
