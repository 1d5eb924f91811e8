"""What rows cost where several processes train together, beside one alone."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.state import PartialState
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch.processes import end_group
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.quality.recorded_runs import SHAPES, Setting, train
from hf_sketch.recipes.tables.recorders import Ours

_MODULE = "hf_sketch.recipes.tables.costs.process_cost"


@dataclass
class ProcessCostArguments(ReportArguments):
    """The seconds of a step with rows to those without, in one process and several."""

    shape: str = field(
        default="tiny-llama", metadata={"help": f"One of {', '.join(SHAPES)}."}
    )
    processes: int = field(
        default=2,
        metadata={"help": "Number of processes that train together, one thread each."},
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row."})
    steps: int = field(
        default=12, metadata={"help": "Steps per run; the first two are not counted."}
    )
    rounds: int = field(
        default=5, metadata={"help": "Rounds; each runs one process, then several."}
    )
    tiny: bool = field(default=False, metadata={"help": "A small model, as a check."})
    worker_directory: str | None = field(
        default=None,
        metadata={"help": "Internal: directory of a child process."},
    )

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {[*SHAPES]}, got {self.shape!r}.")
        if self.steps < 3:
            raise ValueError(
                f"steps must be at least 3, got {self.steps}: pass 3 or more."
            )
        if self.processes < 2:
            raise ValueError(
                f"processes must be at least 2, got {self.processes}: pass 2 or more."
            )


def run_process_cost(arguments: ProcessCostArguments) -> dict[str, Any]:
    """Measure, print and save.

    Each round starts new processes: one alone, then all together. The numbers of
    threads and of examples are the same for each process, so that what several cost
    more is what they exchange and wait for, and the memory that they share.
    """
    overheads: dict[int, list[float]] = {1: [], arguments.processes: []}
    seconds: dict[int, list[dict[str, float]]] = {count: [] for count in overheads}
    for _ in tqdm(range(arguments.rounds), desc="Rounds"):
        for count in overheads:
            run = _in_processes(count, arguments)
            seconds[count].append(run)
            overheads[count].append(run["recorded"] / run["plain"])
    pairs = zip(*overheads.values(), strict=True)
    ratios = [several / one for one, several in pairs]
    results = {
        "seconds": seconds,
        "overheads": overheads,
        "ratio_of_overheads": median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
    }
    for count, values in overheads.items():
        plain = median(run["plain"] for run in seconds[count])
        print(
            f"{count} processes: a step {plain:.3f} s, with rows {median(values):.3f} "
            f"({min(values):.3f}..{max(values):.3f}) times that"
        )
    print(
        f"ratio of the two: {median(ratios):.3f} ({min(ratios):.3f}.."
        f"{max(ratios):.3f}), median of the rounds (least..greatest)"
    )
    name = f"process_cost_{arguments.shape}"
    print(f"saved {save_report(arguments.output_dir, name, arguments, results)}")
    return results


def _in_processes(count: int, arguments: ProcessCostArguments) -> dict[str, float]:
    """The median seconds of a step with and without rows, of the slowest process."""
    with TemporaryDirectory() as directory:
        options = {**vars(arguments), "worker_directory": directory}
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            + ["--nproc_per_node", str(count), "--module", _MODULE]
            + [f"--{name}={value}" for name, value in options.items()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(f"{count} processes failed:\n{run.stderr[-2000:]}")
        runs = [json.loads(path.read_text()) for path in Path(directory).glob("*.json")]
    return {name: max(run[name] for run in runs) for name in ("plain", "recorded")}


def _work(arguments: ProcessCostArguments, directory: Path) -> None:
    """Train twice in one of the processes, and write the seconds down."""
    torch.set_num_threads(1)
    shape = SHAPES[arguments.shape]
    shape = shape.tiny if arguments.tiny else shape
    count = int(os.environ["WORLD_SIZE"])
    steps = arguments.steps
    setting = Setting.of_shape(shape, steps * count)
    seconds: dict[str, float] = {}
    for name in ("warm-up", "plain", "recorded"):
        setting.restore()
        recorder = None
        if name == "recorded":
            recorder = Ours(arguments.out_size, "grouped", per_step=True)
        each = train(setting, recorder, directory / name, steps * count)
        # The first process measures the rows' error in the first step: the others wait
        # for it in the second.
        seconds[name] = median(each[1:])
    rank = PartialState().process_index
    (directory / f"{rank}.json").write_text(json.dumps(seconds))
    end_group()


def main() -> None:
    """Run from the command line."""
    (arguments,) = HfArgumentParser(
        ProcessCostArguments  # pyright: ignore[reportArgumentType]
    ).parse_args_into_dataclasses()
    if arguments.worker_directory is None:
        run_process_cost(arguments)
    else:
        _work(arguments, Path(arguments.worker_directory))


if __name__ == "__main__":
    main()
