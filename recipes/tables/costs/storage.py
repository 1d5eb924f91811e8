"""What the store costs: writing, the training thread's share, opening, and 16 bits."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import spread
from hf_sketch.store.blocks import row_blocks
from hf_sketch.store.header import Header
from hf_sketch.store.log import write_log
from hf_sketch.store.manifest import Manifest
from hf_sketch.store.opening import create_store
from hf_sketch.store.rows import PER_EXAMPLE, ROW_DTYPES, arrow_table, decode, encode
from hf_sketch.store.shards import write_shard
from hf_sketch.store.writer import SketchWriter

_WIDTH = 4096
_ROWS_A_STEP = 8  # of the GPT-2-small setting of per_example_cost.py


@dataclass
class StorageArguments(ReportArguments):
    """Speed of the store beside the file system's own, and the error of short rows."""

    work_dir: str | None = field(
        default=None, metadata={"help": "Directory on the file system to measure."}
    )
    rows: int = field(default=65536, metadata={"help": "Rows of 4096 to write."})
    shards: int = field(default=10000, metadata={"help": "Files of the store opened."})
    rows_a_shard: int = field(default=1000, metadata={"help": "Rows of 64 in each."})
    rounds: int = field(default=5, metadata={"help": "Rounds of each, in turn."})
    tiny: bool = field(default=False, metadata={"help": "Small sizes, as a check."})


def columns_of(step: int, sketches: Tensor) -> dict[str, Tensor]:
    """The columns of a step's rows."""
    count = len(sketches)
    whole = torch.full((count,), step)
    real = torch.ones(count, dtype=torch.float64)
    return {
        "example_id": torch.arange(count),
        "epoch": whole,
        "step": whole,
        "micro_step": whole,
        "rank": whole,
        "learning_rate": real,
        "loss": real.float(),
        "weight": real,
        "gradient_norm": real.float(),
        "finite": real.bool(),
        "sketch": sketches,
    }


def write_rows(directory: Path, rows: int, sketches: Tensor) -> tuple[float, float]:
    """Seconds to write float16 rows, all in all and in the thread that trains."""
    header = Header(ModelSketch((("w", (2 * _WIDTH,)),), _WIDTH), row_dtype="float16")
    writer = SketchWriter(directory, header)
    numbers = torch.arange(1, rows // _ROWS_A_STEP + 1)
    steps = numbers.unsqueeze(1).repeat(1, _ROWS_A_STEP).unbind()
    columns = columns_of(0, sketches)
    start, inside = time.perf_counter(), 0.0
    for step in steps:
        columns["step"] = step
        before = time.perf_counter()
        writer.append(PER_EXAMPLE, columns)
        writer.end_step()
        inside += time.perf_counter() - before
    writer.flush()
    seconds = time.perf_counter() - start
    writer.close()
    return seconds, inside


def write_plainly(path: Path, size_bytes: int) -> float:
    """Seconds to write the same number of bytes to one file, synced at the end."""
    part = os.urandom(2**24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for low in range(0, size_bytes, len(part)):
            file.write(part[: size_bytes - low])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def write_synced_files(directory: Path, size_bytes: int, files: int) -> float:
    """Seconds to write the same bytes to equal files, each synced before the next."""
    part = os.urandom(size_bytes // files)
    directory.mkdir()
    start = time.perf_counter()
    for number in range(files):
        with (directory / str(number)).open("wb") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())
    return time.perf_counter() - start


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def measure_writing(work: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Writing beside plain files of the same size, in turn."""
    sketches = torch.randn(_ROWS_A_STEP, _WIDTH)
    ours: list[float] = []
    plain: list[float] = []
    synced: list[float] = []
    inside: list[float] = []
    size = 0
    for number in tqdm(range(rounds + 1), desc="Writing"):
        with TemporaryDirectory(dir=work) as name:
            seconds, share = write_rows(Path(name) / "sketches", rows, sketches)
            size = size_of(Path(name) / "sketches")
            files = len(list((Path(name) / "sketches").glob("*.arrow")))
            whole = write_plainly(Path(name) / "plain", size)
            parts = write_synced_files(Path(name) / "synced", size, files)
        if number:
            ours.append(seconds)
            plain.append(whole)
            synced.append(parts)
            inside.append(share / (rows / _ROWS_A_STEP))
    return {
        "bytes": size,
        "store": spread(ours),
        "plain_file": spread(plain),
        "synced_files": spread(synced),
        "speed_of_plain": speed_ratio(plain, ours),
        "speed_of_synced_files": speed_ratio(synced, ours),
        "thread_seconds_a_step": median(inside),
    }


def speed_ratio(floors: list[float], seconds: list[float]) -> float:
    """The median over rounds of the store's speed as a part of the floor's."""
    return median(floor / own for floor, own in zip(floors, seconds, strict=True))


def build_store(directory: Path, shards: int, rows: int) -> None:
    """A store of many files, as a long training leaves it."""
    width = 64
    header = Header(ModelSketch((("w", (2 * width,)),), width))
    create_store(directory, header, Manifest())
    columns = columns_of(1, torch.randn(rows, width))
    written = tuple(
        write_shard(
            directory,
            PER_EXAMPLE,
            0,
            number,
            arrow_table(PER_EXAMPLE, {**columns, "step": columns["step"] + number}),
        )
        for number in tqdm(range(1, shards + 1), desc="Building a store")
    )
    write_log(directory, Manifest(shards=written))


def measure_opening(work: Path, shards: int, rows: int, rounds: int) -> dict[str, Any]:
    """Opening and reading a store of many files, beside reading the files."""
    with TemporaryDirectory(dir=work) as name:
        directory = Path(name) / "sketches"
        build_store(directory, shards, rows)
        opened: list[float] = []
        memory: list[int] = []
        mapped: list[int] = []
        passes: list[float] = []
        plain: list[float] = []
        for _ in tqdm(range(rounds), desc="Opening"):
            before, start = psutil.Process().memory_info(), time.perf_counter()
            dataset = load_sketches(directory, verify=False).dataset
            opened.append(time.perf_counter() - start)
            after = psutil.Process().memory_info()
            mapped.append(after.shared - before.shared)
            memory.append(after.rss - before.rss - mapped[-1])
            start = time.perf_counter()
            for block in row_blocks(dataset):
                block.kept.sum()
            passes.append(time.perf_counter() - start)
            start = time.perf_counter()
            for path in directory.iterdir():
                path.read_bytes()
            plain.append(time.perf_counter() - start)
        return {
            "rows": len(dataset),
            "bytes": size_of(directory),
            "opening": spread(opened),
            "opening_own_bytes": max(memory),
            "opening_mapped_bytes": max(mapped),
            "one_pass": spread(passes),
            "reading_the_files": spread(plain),
        }


def measure_rounding() -> dict[str, float]:
    """Error of inner products of unit rows, standard deviation over pairs."""
    rows = torch.nn.functional.normalize(torch.randn(512, _WIDTH), dim=1)
    pairs = torch.triu_indices(512, 512, offset=1)
    exact = (rows.double() @ rows.double().T)[pairs[0], pairs[1]]
    errors: dict[str, float] = {}
    for row_dtype in ROW_DTYPES:
        kept = decode(*encode([rows], row_dtype)).double()
        got = (kept @ kept.T)[pairs[0], pairs[1]]
        errors[row_dtype] = float((got - exact).square().mean().sqrt())
    return errors


def run_storage(arguments: StorageArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, rows=256, shards=20, rows_a_shard=10, rounds=1
        )
    torch.manual_seed(0)
    with TemporaryDirectory(dir=arguments.work_dir) as name:
        writing = measure_writing(Path(name), arguments.rows, arguments.rounds)
        opening = measure_opening(
            Path(name), arguments.shards, arguments.rows_a_shard, arguments.rounds
        )
    results = {"writing": writing, "opening": opening, "rounding": measure_rounding()}
    store, plain = writing["store"], writing["plain_file"]
    print(
        f"writing {arguments.rows:,} float16 rows of {_WIDTH}, "
        f"{writing['bytes'] / 2**20:.0f} MiB: {store['median_seconds']:.2f} s; a plain "
        f"file, synced at its end: {plain['median_seconds']:.2f} s; "
        f"{writing['speed_of_plain']:.0%} of its speed; as many files as the store "
        f"has, each synced: {writing['synced_files']['median_seconds']:.2f} s; "
        f"{writing['speed_of_synced_files']:.0%} of their speed\n"
        f"the training thread spends {1e3 * writing['thread_seconds_a_step']:.3f} ms a "
        f"step of {_ROWS_A_STEP} rows\n"
        f"opening {opening['rows']:,} rows in {arguments.shards:,} files, "
        f"{opening['bytes'] / 2**20:.0f} MiB: "
        f"{opening['opening']['median_seconds']:.2f} s, "
        f"{opening['opening_own_bytes'] / 2**20:.0f} MiB of its own beside the mapped "
        f"files in the page cache; one pass "
        f"{opening['one_pass']['median_seconds']:.2f} s, reading the files "
        f"{opening['reading_the_files']['median_seconds']:.2f} s"
    )
    for row_dtype, error in results["rounding"].items():
        print(f"inner products of unit rows in {row_dtype} are off by {error:.1e}")
    print("saved", save_report(arguments.output_dir, "storage", arguments, results))
    return results


if __name__ == "__main__":
    run_storage(*HfArgumentParser(StorageArguments).parse_args_into_dataclasses())
