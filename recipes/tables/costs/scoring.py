"""How fast a large store is scored: beside reading its files, and the product alone."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import GradientRows, ModelSketch, load_sketches
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.costs.storage import columns_of, size_of
from hf_sketch.recipes.tables.measure import spread
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, QUERY, features
from hf_sketch.store.writer import SketchWriter

_BLOCK = 2048


@dataclass
class ScoringArguments(ReportArguments):
    """Seconds to find the top rows of a store of float16 rows for some queries."""

    work_dir: str | None = field(
        default=None, metadata={"help": "Directory for the temporary store."}
    )
    rows: int = field(default=1_000_000, metadata={"help": "Rows in the store."})
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row."})
    queries: int = field(default=100, metadata={"help": "Scored in one pass."})
    rounds: int = field(
        default=3, metadata={"help": "Rounds; each measures everything once."}
    )
    tiny: bool = field(default=False, metadata={"help": "Small sizes, as a check."})


def build_store(directory: Path, sketch: ModelSketch, rows: int) -> None:
    """A store of random rows."""
    writer = SketchWriter(directory, Header(sketch, row_dtype="float16"))
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(rows // _BLOCK), desc="Building a store"):
        part = torch.randn(_BLOCK, sketch.out_size, generator=generator)
        writer.append(PER_EXAMPLE, columns_of(step + 1, part))
        writer.end_step()
    writer.flush()
    writer.close()


def queries_of(sketch: ModelSketch, count: int) -> GradientRows:
    """Random queries."""
    matrix = torch.randn(count, sketch.out_size)
    columns = {
        "example_id": list(range(count)),
        "loss": [0.0] * count,
        "gradient_norm": [0.0] * count,
        "finite": [True] * count,
        "sketch": matrix.tolist(),
    }
    schema = features(QUERY, sketch.out_size)
    return GradientRows(sketch, Dataset.from_dict(columns, features=schema))


def read_files(directory: Path) -> float:
    """Seconds to read every file once, in parts."""
    memory = bytearray(2**23)
    start = time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass
    return time.perf_counter() - start


def product_alone(rows: int, queries: Tensor) -> float:
    """Seconds for the same inner products, with rows already in float32."""
    block = torch.randn(_BLOCK, queries.shape[1])
    start = time.perf_counter()
    for _ in range(rows // _BLOCK):
        queries @ block.T
    return time.perf_counter() - start


def own_bytes() -> int:
    """Of this process, without the mapped files in the page cache."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measure_scoring(work: Path, arguments: ScoringArguments) -> dict[str, Any]:
    """Scoring beside its floors, in turn."""
    sketch = ModelSketch((("w", (2 * arguments.out_size,)),), arguments.out_size)
    queries = queries_of(sketch, arguments.queries)
    matrix = torch.randn(arguments.queries, arguments.out_size)
    build_store(work / "sketches", sketch, arguments.rows)
    store = load_sketches(work, verify=False)
    seconds: dict[str, list[float]] = {"scoring": [], "reading": [], "product": []}
    own: list[int] = []
    for _ in range(arguments.rounds):
        before, start = own_bytes(), time.perf_counter()
        store.attribute(queries, 10, "dot", groups=None)
        seconds["scoring"].append(time.perf_counter() - start)
        own.append(own_bytes() - before)
        seconds["reading"].append(read_files(work / "sketches"))
        seconds["product"].append(product_alone(arguments.rows, matrix))
    floors = zip(seconds["reading"], seconds["product"], strict=True)
    ratios = [s / max(f) for s, f in zip(seconds["scoring"], floors, strict=True)]
    return {
        "rows": len(store.dataset),
        "bytes": size_of(work / "sketches"),
        "ratio_to_the_larger_floor": median(ratios),
        "own_bytes": max(own),
        **{name: spread(values) for name, values in seconds.items()},
    }


def run_scoring(arguments: ScoringArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, rows=4096, out_size=64, queries=3, rounds=1
        )
    torch.manual_seed(0)
    with TemporaryDirectory(dir=arguments.work_dir) as name:
        results = measure_scoring(Path(name), arguments)
    medians = {
        name: results[name]["median_seconds"]
        for name in ("scoring", "reading", "product")
    }
    print(
        f"{results['rows']:,} float16 rows of {arguments.out_size}, "
        f"{results['bytes'] / 2**30:.2f} GiB, {arguments.queries} queries: scoring "
        f"{medians['scoring']:.2f} s, reading the files {medians['reading']:.2f} s, "
        f"the product alone {medians['product']:.2f} s; "
        f"{results['ratio_to_the_larger_floor']:.2f} times the larger; "
        f"{results['own_bytes'] / 2**20:.0f} MiB more memory of its own"
    )
    print("saved", save_report(arguments.output_dir, "scoring", arguments, results))
    return results


if __name__ == "__main__":
    run_scoring(*HfArgumentParser(ScoringArguments).parse_args_into_dataclasses())
