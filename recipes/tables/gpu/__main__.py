"""Run it: `python -m hf_sketch.recipes.tables.gpu --output_dir docs/results`."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_sketch.recipes.placement import device_name
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.gpu.sections import Settings, sections_of

_IN_ALL = 480.0  # seconds


@dataclass
class GpuArguments(ReportArguments):
    """The costs that the CPU's tables tell, on the accelerator that is there.

    Each section has a time limit, and all take eight minutes at most. Results are saved
    after each in `gpu.json`, beside those of earlier runs into the same folder. The
    ceilings come first: no sketch can be faster than a read of the gradient.
    """

    sections: str = field(
        default="", metadata={"help": "What is run, comma-separated; all if ''."}
    )
    rounds: int = field(default=3, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "Small models and one round, as a check."}
    )


def run_gpu(arguments: GpuArguments) -> dict[str, Any]:
    """Run the sections in turn, print, and save after each.

    Raises:
        ValueError: there is no such section.
    """
    begun = time.perf_counter()
    path = Path(arguments.output_dir) / "gpu.json"
    found: dict[str, Any] = {}
    if path.is_file():
        found = json.loads(path.read_text())["results"]
    rounds = 1 if arguments.tiny else arguments.rounds
    known = sections_of(Settings(arguments.output_dir, rounds, arguments.tiny, found))
    chosen = arguments.sections.split(",") if arguments.sections else [*known]
    if unknown := set(chosen) - set(known):
        raise ValueError(f"sections must be among {[*known]}, got {sorted(unknown)}.")
    print("on", device_name())
    for name in chosen:
        left = begun + _IN_ALL - time.perf_counter()
        found[name] = known[name].run(left)
        print_section(name, found[name])
        save_report(arguments.output_dir, "gpu", arguments, found)
    print("saved", path)
    return found


def print_section(name: str, section: Mapping[str, Any]) -> None:
    """What a section took and found, or why it found nothing."""
    print(f"{name}: {section['seconds']:.0f} s")
    for ended in ("stopped", "failed"):
        if ended in section:
            print(f"  {ended} {section[ended]}")
    results = section.get("results")
    if not isinstance(results, Mapping):
        return
    for key, figure in results.items():
        if isinstance(figure, Mapping) and "median_seconds" in figure:
            numbers = [(k, x) for k, x in figure.items() if isinstance(x, float)]
            ratios = [f"{k} {x:.2f}" for k, x in numbers if "ratio" in k]
            print(f"  {key}: {1e3 * figure['median_seconds']:.3f} ms", *ratios)
        elif isinstance(figure, float):
            print(f"  {key}: {figure:.4g}")


if __name__ == "__main__":
    run_gpu(*HfArgumentParser(GpuArguments).parse_args_into_dataclasses())
