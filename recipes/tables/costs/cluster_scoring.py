"""How the rate of scoring a store on a cluster grows with its workers."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datatrove.executor import LocalPipelineExecutor
from transformers import HfArgumentParser

from hf_sketch import GradientRows, ModelSketch, load_sketches
from hf_sketch.attribution.cluster.stages import Stage, attribution_stages
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.costs.scoring import build_store, queries_of
from hf_sketch.recipes.tables.measure import spread


@dataclass
class ClusterScoringArguments(ReportArguments):
    """Seconds of the tasks that score a store, by the number of datatrove's workers."""

    work_dir: str | None = field(
        default=None, metadata={"help": "Directory for the temporary store."}
    )
    rows: int = field(
        default=1_000_000, metadata={"help": "Rows in the store, in float16."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row."})
    queries: int = field(default=400, metadata={"help": "Scored in one pass."})
    tasks: int = field(default=12, metadata={"help": "Parts of the store."})
    workers: str = field(
        default="1,2", metadata={"help": "Numbers of workers, comma-separated."}
    )
    rounds: int = field(
        default=3, metadata={"help": "Rounds; each measures everything once."}
    )
    tiny: bool = field(default=False, metadata={"help": "Small sizes, as a check."})


def run_stage(stage: Stage, workers: int) -> float:
    """Seconds of a stage, with the start of its workers, of one thread each."""
    executor = LocalPipelineExecutor(
        [stage.task], tasks=stage.tasks, workers=workers, logging_dir=stage.logs
    )
    start = time.perf_counter()
    executor.run()
    return time.perf_counter() - start


def measure_workers(
    store: GradientRows, queries: GradientRows, arguments: ClusterScoringArguments
) -> dict[int, list[float]]:
    """Seconds of the pass over the rows with each number of workers, in turn."""
    counts = [int(count) for count in arguments.workers.split(",")]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(arguments.rounds):
        for count in counts:
            with TemporaryDirectory(dir=arguments.work_dir) as answers:
                scores, *_ = attribution_stages(
                    store, queries, answers, arguments.tasks, 10, "dot", groups=None
                )
                seconds[count].append(run_stage(scores, count))
    return seconds


def run_cluster_scoring(arguments: ClusterScoringArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, rows=4096 * 4, out_size=1024, queries=3, tasks=2, rounds=1
        )
    os.environ["OMP_NUM_THREADS"] = "1"  # of workers in processes of their own,
    torch.set_num_threads(1)  # and of a single one, which runs in this process
    sketch = ModelSketch((("w", (2 * arguments.out_size,)),), arguments.out_size)
    torch.manual_seed(0)
    with TemporaryDirectory(dir=arguments.work_dir) as name:
        build_store(Path(name) / "sketches", sketch, arguments.rows)
        store = load_sketches(name, verify=False)
        queries = queries_of(sketch, arguments.queries)
        seconds = measure_workers(store, queries, arguments)
        rows = len(store.dataset)
    spreads = {count: spread(values) for count, values in seconds.items()}
    first = min(seconds)
    for count, found in spreads.items():
        ratio = spreads[first]["median_seconds"] / found["median_seconds"]
        print(
            f"{count} workers of one thread: {found['median_seconds']:.1f} s for "
            f"{rows:,} rows, {ratio:.2f} times the rate of {first}"
        )
    results = {"rows": rows, "cores": os.cpu_count(), "seconds": spreads}
    path = save_report(arguments.output_dir, "cluster_scoring", arguments, results)
    print("saved", path)
    return results


if __name__ == "__main__":
    run_cluster_scoring(
        *HfArgumentParser(ClusterScoringArguments).parse_args_into_dataclasses()
    )
