"""What many flushes cost: manifests, seconds, and files before and after joining."""

import dataclasses
import shutil
import time
import warnings
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import psutil
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.costs.scoring import own_bytes
from hf_sketch.recipes.tables.costs.storage import columns_of
from hf_sketch.recipes.tables.measure import spread
from hf_sketch.store import log
from hf_sketch.store.compaction import LEAST_BYTES, compact
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter

_WIDTH = 64


@dataclass
class FlushesArguments(ReportArguments):
    """Record a store, joined while it grows or afterwards, and open it."""

    work_dir: str | None = field(
        default=None, metadata={"help": "Directory on the file system to measure."}
    )
    flushes: int = field(default=10000, metadata={"help": "Flushes to record."})
    rows: int = field(default=1000, metadata={"help": "int8 rows of 64 per flush."})
    rounds: int = field(default=5, metadata={"help": "Times that a store is opened."})
    tiny: bool = field(default=False, metadata={"help": "Small sizes, as a check."})


@contextmanager
def counted_writes(written: list[int]) -> Generator[None]:
    """Append the length of what is written to manifests."""
    append_file, replace_file = log.append_file, log.replace_file

    def append(path: Path, size_bytes: int, data: bytes) -> None:
        append_file(path, size_bytes, data)
        written.append(len(data))

    def replace(path: Path, data: bytes) -> None:
        replace_file(path, data)
        written.append(len(data))

    with patch.multiple(log, append_file=append, replace_file=replace):
        yield


def record(
    directory: Path, flushes: int, rows: int, file_bytes: int = LEAST_BYTES
) -> dict[str, Any]:
    """Write rows with a flush per step; bytes of manifests, and medians of seconds."""
    header = Header(ModelSketch((("w", (2 * _WIDTH,)),), _WIDTH), row_dtype="int8")
    writer = SketchWriter(directory, header, file_bytes=file_bytes)
    columns = columns_of(0, torch.randn(rows, _WIDTH))
    growth: list[int] = []
    seconds: list[float] = []
    busy: list[float] = []
    own: list[int] = []
    written = [(directory / "manifest-00000.jsonl").stat().st_size]
    with counted_writes(written):
        for step in tqdm(range(1, flushes + 1), desc="Recording"):
            columns["step"] = torch.full((rows,), step)
            start, start_busy = time.perf_counter(), time.process_time()
            writer.append(PER_EXAMPLE, columns)
            writer.flush()
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - start_busy)
            own.append(own_bytes())
            growth.append(sum(written))
    writer.close()
    tenth = flushes // 10
    ends = range(tenth, flushes + 1, tenth)
    return {
        "manifest_bytes": {end: growth[end - 1] for end in ends},
        "seconds_per_flush": {end: median(seconds[end - tenth : end]) for end in ends},
        # What other programs do to the processors and the disk is not in these.
        "cpu_seconds_per_flush": {end: median(busy[end - tenth : end]) for end in ends},
        "own_bytes": {end: max(own[end - tenth : end]) for end in ends},
    }


def open_once(directory: Path) -> tuple[float, int, int]:
    """Seconds to open a store, bytes that this takes beside mapped ones, and rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checksums of large stores are skipped
        before, start = psutil.Process().memory_info(), time.perf_counter()
        dataset = load_sketches(directory).dataset
        seconds = time.perf_counter() - start
        after = psutil.Process().memory_info()
    mapped = after.shared - before.shared
    return seconds, after.rss - before.rss - mapped, len(dataset)


def measure_opening(directory: Path, rounds: int) -> dict[str, Any]:
    """Open a store several times, each in a process of its own."""
    results: list[tuple[float, int, int]] = []
    for _ in range(rounds):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            results.append(process.submit(open_once, directory).result())
    seconds, own_bytes, rows = zip(*results, strict=True)
    return {
        "files": len(list(directory.glob("*.arrow"))),
        "rows": rows[0],
        "opening": spread(list(seconds)),
        "own_bytes": max(own_bytes),
    }


def run_flushes(arguments: FlushesArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, flushes=20, rows=10, rounds=1)
    torch.manual_seed(0)
    with TemporaryDirectory(dir=arguments.work_dir) as name:
        directory = Path(name) / "sketches"
        recorded = record(directory, arguments.flushes, arguments.rows)
        joined = measure_opening(directory, arguments.rounds)
        shutil.rmtree(directory)
        record(directory, arguments.flushes, arguments.rows, file_bytes=1)
        size = sum(path.stat().st_size for path in directory.glob("*.arrow"))
        many = measure_opening(directory, arguments.rounds)
        start = time.perf_counter()
        compact(directory)
        seconds = time.perf_counter() - start
        few = measure_opening(directory, arguments.rounds)
    results = {
        **recorded,
        "bytes": size,
        "joined_while_recording": joined,
        "many_files": many,
        "joining_seconds": seconds,
        "joined_files": few,
    }
    for end, written in recorded["manifest_bytes"].items():
        print(
            f"{end:,} flushes: {written:,} bytes of manifests; one of the last tenth "
            f"takes {1e3 * recorded['seconds_per_flush'][end]:.1f} ms, of which "
            f"{1e3 * recorded['cpu_seconds_per_flush'][end]:.2f} ms on a processor; "
            f"{recorded['own_bytes'][end] / 2**20:,.0f} MiB of memory"
        )
    print(f"joining {size / 2**20:,.0f} MiB took {seconds:.1f} s")
    for opened in (joined, many, few):
        print(
            f"opening {opened['rows']:,} rows in {opened['files']:,} files: "
            f"{opened['opening']['median_seconds']:.3f} s, "
            f"{opened['own_bytes'] / 2**20:.0f} MiB"
        )
    print("saved", save_report(arguments.output_dir, "flushes", arguments, results))
    return results


if __name__ == "__main__":
    run_flushes(*HfArgumentParser(FlushesArguments).parse_args_into_dataclasses())
