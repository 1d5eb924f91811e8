"""Figures 3 and 4: time and memory of FJL and AFJL as the sketch grows."""

import dataclasses
import importlib
import importlib.util
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import AFJL, FJL, Sketch
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import (
    fitting_bits,
    milliseconds,
    peak_extra_bytes,
    spread,
    timed,
)
from hf_sketch.recipes.tables.models.language_model import model_gradient

_BYTES_OF_A_DRAW = 60  # at the peak of drawing one entry of FJL's sparse matrix


@dataclass
class Figures34Arguments(ReportArguments):
    """Wall time and extra memory of FJL and AFJL on one gradient by sketch size.

    Both are of one block, as in the paper. The memory is that of the first use, which
    draws what the operator keeps; the time is that of later ones. The paper does not
    say how many samples a row of FJL's sparse matrix has; hundreds would explain that
    a V100 runs out of memory beyond 2^20.
    """

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    elements: int = field(
        default=2**22,
        metadata={"help": "How much of the model's gradient is used; 0 for all of it."},
    )
    bits: str = field(
        default="10,11,12,13,14,15,16,17,18,19,20,21,22",
        metadata={
            "help": "log2 of the sketch sizes; those above elements are left out."
        },
    )
    samples: int = field(
        default=16, metadata={"help": "Entries in a row of FJL's sparse matrix."}
    )
    memory_gib: float = field(
        default=8.0,
        metadata={"help": "An FJL whose matrix takes more while drawn is left out."},
    )
    rounds: int = field(default=5, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def operators_of(
    arguments: Figures34Arguments, in_size: int
) -> tuple[dict[str, dict[int, Sketch]], list[str]]:
    """By name and log2 of the size; and a line for each that is left out."""
    operators: dict[str, dict[int, Sketch]] = {"fjl": {}, "afjl": {}}
    left_out: list[str] = []
    fitting = fitting_bits(arguments.bits, in_size)
    for bits in fitting:
        needed = _BYTES_OF_A_DRAW * arguments.samples * 2**bits / 2**30
        operators["afjl"][bits] = AFJL(in_size, 2**bits, 0)
        if needed <= arguments.memory_gib:
            fjl = FJL(in_size, 2**bits, 0, samples=arguments.samples)
            operators["fjl"][bits] = fjl
        else:
            left_out.append(
                f"fjl 2^{bits}: drawing its matrix takes {needed:.3g} GiB, more than "
                f"memory_gib={arguments.memory_gib:g}"
            )
    above = sorted(set(map(int, arguments.bits.split(","))) - set(fitting))
    if above:
        left_out.append(f"log2 sizes {above}: not in [1, log2 of the elements]")
    return operators, left_out


def measure(
    operators: Mapping[str, Mapping[int, Sketch]], gradient: Tensor, rounds: int
) -> dict[str, dict[int, dict[str, float]]]:
    """The peak of the first use and the spread of the times of later ones."""
    actions = {
        (name, bits): partial(operator.matmul, sketch, gradient)
        for name, by_bits in operators.items()
        for bits, sketch in by_bits.items()
    }
    peaks = {case: peak_extra_bytes(action) for case, action in actions.items()}
    seconds = timed(
        {f"{name} 2^{bits}": action for (name, bits), action in actions.items()}, rounds
    )
    costs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in operators}
    for (name, bits), peak in peaks.items():
        times = spread(seconds[f"{name} 2^{bits}"])
        costs[name][bits] = {**times, "extra_peak_bytes": peak}
    return costs


def growth_of(costs: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """From the smallest to the largest sketch: how many times the time and the peak."""
    first, last = min(costs), max(costs)
    return {
        "from_bits": first,
        "to_bits": last,
        "time_ratio": costs[last]["median_seconds"] / costs[first]["median_seconds"],
        "memory_ratio": (
            costs[last]["extra_peak_bytes"] / costs[first]["extra_peak_bytes"]
        ),
    }


def print_figures(arguments: Figures34Arguments, results: Mapping[str, Any]) -> None:
    """Both figures as a table, and the paper's claim beside ours."""
    print(
        f"Figures 3 and 4: one gradient of {results['elements']:,} elements of a "
        f"{arguments.model_type}, {arguments.samples} samples in a row of FJL's "
        "matrix, on the\n"
        f"processor with {torch.get_num_threads()} threads; ms, median "
        "(least..greatest), and MiB beyond the gradient"
    )
    for name, costs in results["costs"].items():
        for bits, cost in costs.items():
            peak = cost["extra_peak_bytes"] / 2**20
            print(
                f"  {name:4s} 2^{bits:<2d} {milliseconds(cost):32s} ms {peak:9.1f} MiB"
            )
    for line in results["left_out"]:
        print(f"  left out: {line}")
    print(
        "the paper's, in words: FJL's time and memory rise with the sketch, and beyond "
        "2^20 it is out of memory\n  on one V100; AFJL scales. Ours:"
    )
    for name, growth in results["growth"].items():
        print(
            "  {name:4s} from 2^{from_bits} to 2^{to_bits}: {time_ratio:.3g} x the "
            "time, {memory_ratio:.3g} x the memory".format(name=name, **growth)
        )


def save_plot(
    path: Path, costs: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> None:
    """Time and memory by sketch size, in one picture."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(9, 4), layout="constrained"
    )
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, by_bits in costs.items():
        sizes = [2**bits for bits in by_bits]
        least, middle, greatest = (
            [cost[f"{which}_seconds"] for cost in by_bits.values()]
            for which in ("least", "median", "greatest")
        )
        peaks = [cost["extra_peak_bytes"] / 2**20 for cost in by_bits.values()]
        (line,) = time_axes.plot(sizes, middle, marker="o", label=name.upper())
        time_axes.fill_between(
            sizes, least, greatest, color=line.get_color(), alpha=0.2
        )
        memory_axes.plot(sizes, peaks, marker="o", label=name.upper())
    time_axes.set_ylabel("seconds: median, least to greatest")
    memory_axes.set_ylabel("MiB beyond the gradient, first use")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("size of the sketch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def run_figures_3_4(arguments: Figures34Arguments) -> dict[str, Any]:
    """Measure, print beside the paper's claim, save, and plot with matplotlib."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, elements=2**14, bits="6,8,10,12,14", rounds=1
        )
    gradient = model_gradient(
        arguments.model_type, arguments.elements or None, arguments.tiny
    )
    operators, left_out = operators_of(arguments, len(gradient))
    costs = measure(operators, gradient, arguments.rounds)
    results = {
        "elements": len(gradient),
        "costs": costs,
        "growth": {
            name: growth_of(by_bits) for name, by_bits in costs.items() if by_bits
        },
        "left_out": left_out,
    }
    print_figures(arguments, results)
    path = save_report(arguments.output_dir, "figures_3_4", arguments, results)
    print("saved", path)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed, pip install 'hf-sketch[plot]'")
    else:
        save_plot(path.with_suffix(".png"), costs)
        print("saved", path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    run_figures_3_4(*HfArgumentParser(Figures34Arguments).parse_args_into_dataclasses())
