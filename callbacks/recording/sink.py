"""Rows on their way from the device that trains to the store."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from accelerate.state import PartialState
from torch import Tensor
from transformers import TrainingArguments

from hf_sketch.store.header import Header, read_header
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter

_MOST_BYTES = 2**25
_MOST_PARTS = 256  # each one more argument of the program that joins them

Columns = Mapping[str, Tensor]
Rows = tuple[str, Columns]


def stored_layout(args: TrainingArguments, resume_step: int) -> str | None:
    """Return the layout of the store that training resumes; None if none is known."""
    if not resume_step:
        return None
    try:
        return read_header(_store(args)).model_sketch.layout
    except (FileNotFoundError, ValueError):  # as it is opened, its rows decide
        return None


class RowSink:
    """Moves rows to the CPU, warns of what is special about them, and writes them.

    An accelerator need not wait for its rows step by step: they leave in one transfer
    when there are many. Training goes on meanwhile where the device can do both, and
    the writer gets them when the next ones leave, or at a flush. It gets rows that are
    on the CPU already as they come.

    Args:
        writer: writer of the store.
    """

    def __init__(self, writer: SketchWriter) -> None:
        self.writer = writer
        self._held: list[Rows] = []
        self._bytes = 0
        self._arrivals: Callable[[], Iterator[Rows]] | None = None
        self._told_of_losses = False

    @classmethod
    def open(
        cls, header: Header, args: TrainingArguments, resume_step: int
    ) -> "RowSink":
        """Open the store of a run; see `SketchWriter`.

        One process makes the files, and one per machine where they share no disk.
        """
        directory = _store(args)
        processes = PartialState()
        rank, world_size = args.process_index, args.world_size
        with processes.main_process_first(), processes.local_main_process_first():
            writer = SketchWriter(
                directory, header, resume_step, rank=rank, world_size=world_size
            )
        return cls(writer)

    def append(self, kind: str, columns: Columns) -> None:
        """Add rows: every column (rows,), `sketch` (rows, out_size)."""
        away = _away(columns)
        if not away:
            self._write(kind, columns)
            return
        self._held.append((kind, columns))
        self._bytes += sum(column.nbytes for column in away)

    def end_step(self) -> None:
        """Send rows on if there are many, now that a step's are complete."""
        if self._bytes >= _MOST_BYTES or len(self._held) >= _MOST_PARTS:
            self._send()
        self.writer.end_step()

    def flush(self) -> None:
        """Write all rows; they are in the store when this returns."""
        if self._held:
            self._send()
        self._receive()
        self.writer.flush()

    def close(self) -> None:
        """Drop rows that are not written, and wait for those that are under way."""
        self._held, self._arrivals = [], None
        self.writer.close()

    def _send(self) -> None:
        held, self._held, self._bytes = self._held, [], 0
        arrivals = _transfer(held)
        self._receive()  # those before, which are there by now
        self._arrivals = arrivals

    def _receive(self) -> None:
        arrivals, self._arrivals = self._arrivals, None
        if arrivals is not None:
            for kind, columns in arrivals():
                self._write(kind, columns)

    def _write(self, kind: str, columns: Columns) -> None:
        """Give rows that are on the CPU to the writer."""
        if kind == PER_EXAMPLE:
            self._warn(columns)
        self.writer.append(kind, columns)

    def _warn(self, columns: Columns) -> None:
        """Say what is special about the rows of a micro-batch."""
        finite = columns["finite"]
        if not finite.all():
            broken = columns["example_id"][~finite].tolist()
            warnings.warn(
                f"The gradients of examples {broken} are NaN or infinite at step "
                f"{int(columns['step'][0])}. Their rows are stored with finite=False.",
                stacklevel=2,
            )
        elif columns["loss"].isnan().all() and not self._told_of_losses:
            self._told_of_losses = True
            warnings.warn(
                "The loss is computed outside the model (label smoothing, or "
                "compute_loss_func) or without logits, so the loss column is NaN. "
                "Unless it is the model's own mean over examples or tokens, a row is "
                "the gradient of its example's share of the batch's loss, times the "
                "batch size. A loss of one call of the model that compares examples is "
                "not detected.",
                stacklevel=2,
            )


def _transfer(held: Sequence[Rows]) -> Callable[[], Iterator[Rows]]:
    """Start to move rows to the CPU as one tensor; the result waits for them."""
    away = [column for _, columns in held for column in _away(columns)]
    dtype = reduce(torch.promote_types, (x.dtype for x in away))
    joined = torch.cat([x.detach().reshape(-1).to(dtype) for x in away])
    flat = joined.to("cpu", non_blocking=joined.is_cuda)  # into pinned memory
    done = torch.cuda.Event() if joined.is_cuda else None
    if done is not None:
        done.record(torch.cuda.current_stream(joined.device))

    def arrivals() -> Iterator[Rows]:
        if done is not None:
            done.synchronize()
        start = 0
        for kind, columns in held:
            here: dict[str, Tensor] = {}
            for name, column in columns.items():
                here[name] = column
                if not column.is_cpu:
                    part = flat[start : start + column.numel()]
                    here[name] = part.view(column.shape).to(column.dtype)
                    start += column.numel()
            yield kind, here

    return arrivals


def _away(columns: Columns) -> list[Tensor]:
    """The columns that are not on the CPU."""
    return [column for column in columns.values() if not column.is_cpu]


def _store(args: TrainingArguments) -> Path:
    """Where a run's rows go, also if that is a link or the directory changes later."""
    return (Path(args.output_dir or ".") / "sketches").resolve()
