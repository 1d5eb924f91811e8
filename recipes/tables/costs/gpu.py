"""What a GPU gives and what the sketches take of it, all in one run."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Dense, Sketch
from hf_sketch.recipes.placement import device, device_name
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.costs.hvp_cost import HvpCostArguments, measure_products
from hf_sketch.recipes.tables.costs.per_example_cost import (
    PerExampleCostArguments,
    run_per_example_cost,
)
from hf_sketch.recipes.tables.costs.step_cost import StepCostArguments, run_step_cost
from hf_sketch.recipes.tables.costs.subspace_cost import (
    SubspaceCostArguments,
    run_subspace_cost,
)
from hf_sketch.recipes.tables.measure import timed
from hf_sketch.recipes.tables.paper.table8 import Table8Arguments, run_table8
from hf_sketch.recipes.tables.paper.table11 import Table11Arguments, run_table11

_SIDE = 2**13  # of the matrices whose product tells the rate of arithmetic


@dataclass
class GpuArguments(ReportArguments):
    """The costs that the CPU's tables tell, on the accelerator that is there.

    Each section saves a table of its own, and all are joined in `gpu.json`, also those
    of earlier runs into the same folder. The ceilings come first: no sketch can be
    faster than a read of the gradient.
    """

    sections: str = field(
        default="ceilings,agreement,step,tables_3_4_8,table_11,examples,"
        "examples_bfloat16,hessian,subspace",
        metadata={"help": "What is run, comma-separated."},
    )
    rounds: int = field(default=5, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "Small models and one round, as a check."}
    )


def ceilings(arguments: GpuArguments) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and flops of a bfloat16 product."""
    side = _SIDE // 64 if arguments.tiny else _SIDE
    matrix = torch.randn(side, side, device=device()).bfloat16()
    source = torch.randn(4 * side, side, device=device())
    target = torch.empty_like(source)
    actions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: matrix @ matrix,
    }
    seconds = {n: median(ts) for n, ts in timed(actions, arguments.rounds).items()}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "bfloat16_flops_per_second": 2 * side**3 / seconds["product"],
    }


def operators(in_size: int, out_size: int) -> list[Sketch]:
    """One of each operator and mix."""
    sizes = (in_size, out_size, 0)
    mixed = [
        kind(*sizes, mix=mix)
        for kind in (FJL, AFFD, AFJL)
        for mix in ("hadamard", "fft", "kronecker")
    ]
    blocked = [kind(*sizes, block_size=2**12) for kind in (SRHT, AFFD, AFJL)]
    dense = Dense(2**12, 2**6, 0)
    return [*mixed, *blocked, SRHT(*sizes), FFD(*sizes), QK(*sizes), dense]


def agreement(arguments: GpuArguments) -> dict[str, dict[str, float]]:
    """Distances of sketches and adjoints from the CPU's, relative to their norms."""
    in_size, out_size = (2**12, 2**8) if arguments.tiny else (2**20, 2**12)
    distances: dict[str, dict[str, float]] = {}
    for operator in operators(in_size, out_size):
        x, y = torch.randn(operator.in_size), torch.randn(operator.out_size)
        pairs = {
            "sketch": (operator @ x.to(device()), operator @ x),
            "adjoint": (operator.T @ y.to(device()), operator.T @ y),
        }
        distances[repr(operator)] = {
            name: _distance(got, expected) for name, (got, expected) in pairs.items()
        }
    return distances


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu() - expected).norm() / expected.norm())


def sections_of(arguments: GpuArguments) -> dict[str, Callable[[], Any]]:
    """What can be run, by name."""
    shared: dict[str, Any] = {
        "output_dir": arguments.output_dir,
        "rounds": arguments.rounds,
        "tiny": arguments.tiny,
    }
    examples = partial(PerExampleCostArguments, runs="grouped", steps=12, **shared)
    hvp = HvpCostArguments(examples=2, tokens=16, bits=8, **shared)
    if not arguments.tiny:
        hvp = dataclasses.replace(hvp, examples=8, tokens=128, bits=14)
    return {
        "ceilings": partial(ceilings, arguments),
        "agreement": partial(agreement, arguments),
        "step": lambda: run_step_cost(StepCostArguments(**shared)),
        "tables_3_4_8": lambda: run_table8(
            Table8Arguments(elements=2**24, bits=12, **shared)
        ),
        "table_11": lambda: run_table11(
            Table11Arguments(elements=0, longest_seconds=1, **shared)
        ),
        "examples": lambda: run_per_example_cost(examples()),
        "examples_bfloat16": lambda: run_per_example_cost(
            examples(shape="gpt2-small-bf16")
        ),
        "hessian": lambda: measure_products(hvp),
        "subspace": lambda: run_subspace_cost(
            SubspaceCostArguments(operators="affd,srht", **shared)
        ),
    }


def run_gpu(arguments: GpuArguments) -> dict[str, Any]:
    """Run the sections in turn, print, and save after each.

    Raises:
        ValueError: there is no such section.
    """
    known = sections_of(arguments)
    chosen = arguments.sections.split(",")
    if unknown := set(chosen) - set(known):
        raise ValueError(f"sections must be among {[*known]}, got {sorted(unknown)}.")
    print("on", device_name())
    path = Path(arguments.output_dir) / "gpu.json"
    results: dict[str, Any] = {}
    if path.is_file():
        results = json.loads(path.read_text())["results"]
    for name in chosen:
        start = time.perf_counter()
        result = known[name]()
        seconds = time.perf_counter() - start
        results[name] = {"seconds": seconds, "results": result}
        print_section(name, results[name])
        save_report(arguments.output_dir, "gpu", arguments, results)
    print("saved", path)
    return results


def print_section(name: str, section: Mapping[str, Any]) -> None:
    """What a section took; and what it found, if it has no table of its own."""
    print(f"{name}: {section['seconds']:.0f} s")
    if name in ("ceilings", "agreement", "hessian"):
        for key, figure in section["results"].items():
            print(f"  {key}: {figure}")


if __name__ == "__main__":
    run_gpu(*HfArgumentParser(GpuArguments).parse_args_into_dataclasses())
