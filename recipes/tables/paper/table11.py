"""Table 11: what on-the-fly dense projections cost as the sketch grows, and others."""

import dataclasses
import importlib
import operator
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import Dense
from hf_sketch.recipes.placement import device, device_name
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import (
    fitting_bits,
    milliseconds,
    spread,
    timed,
)
from hf_sketch.recipes.tables.models.language_model import model_gradient
from hf_sketch.recipes.tables.peers import PEERS
from hf_sketch.sketches.by_name import choose_operator

# Schioppa 2024, Table 11: milliseconds on one V100 for sketches of 2^12, 2^13, ...
PUBLISHED = {
    "TRAK[CUDA]": (359, 594, 1078, 2047, 3969, 7812, 15500),
    "TRAK[Triton]": (879, 2885, 6073, 12900),
    "AFFD": (213, 207, 207, 215, 219, 210, 209),
    "QK": (84, 87, 91, 82, 82, 91, 90),
}
# Which of ours stand beside a row of the paper's.
_BESIDE = {
    "TRAK[CUDA]": ("traker", "dense"),
    "TRAK[Triton]": ("traker", "dense"),
    "AFFD": ("affd", "affd in blocks"),
    "QK": ("qk",),
}
# The others by name: the operator, and whether it has one block, as the paper's.
_SKETCHES = {
    "affd": ("affd", True),
    "affd in blocks": ("affd", False),
    "qk": ("qk", True),
    "srht in blocks": ("srht", False),
}
_MOST_COLUMNS = 64  # a power of two: the projector draws whole blocks of columns

Projection = Callable[[Tensor], Tensor]
Make = Callable[[int], Projection]  # of the sketch size


@dataclass
class Table11Arguments(ReportArguments):
    """Wall time by sketch size of dense projections, AFFD, QK and SRHT on one gradient.

    The dense projections, whose matrix is drawn again on every use, are the projector
    for a CPU of the package traker, where it is installed, and our Dense. Their time
    grows with the sketch. Each is tried at 2, 4, 8, ... numbers up to the largest size
    that one use finishes in time, and timed there and at all smaller sizes asked for;
    the time of a larger one is said to be as many times longer as the sketch is, and
    marked.
    """

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    elements: int = field(
        default=2**20,
        metadata={"help": "How much of the model's gradient is used; 0 for all of it."},
    )
    bits: str = field(
        default="12,13,14,15,16,17,18",
        metadata={
            "help": "log2 of the sketch sizes; those above elements are left out."
        },
    )
    longest_seconds: float = field(
        default=10.0,
        metadata={"help": "A use of a dense projection that takes longer is not run."},
    )
    matrix_gib: float = field(
        default=1.0,
        metadata={"help": "Most memory for the columns that traker draws at a time."},
    )
    rounds: int = field(default=3, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def traker_projection(in_size: int, matrix_bytes: float, out_size: int) -> Projection:
    """The projector of traker for a CPU, scaled so that norms are kept.

    It keeps a block of columns, and redraws them one block after the other on every
    use if there are two blocks at least. Its default of 100 columns is lowered to a
    power of two, so that no draw is wasted.
    """
    room = max(1, int(matrix_bytes / (4 * in_size)))
    columns = min(_MOST_COLUMNS, out_size // 2, 1 << (room.bit_length() - 1))
    projector = importlib.import_module("trak.projectors").BasicProjector(
        grad_dim=in_size,
        proj_dim=out_size,
        seed=0,
        proj_type="normal",
        device=str(device()),
        block_size=columns,
    )

    def project(gradient: Tensor) -> Tensor:
        (row,) = projector.project(gradient.unsqueeze(0), model_id=0)
        return row * out_size**-0.5

    return project


def most_bits_in_time(
    make: Make, gradient: Tensor, most: int, longest_seconds: float
) -> int:
    """Log2 of the largest sketch that takes at most so long; 0 if one of 2 does not.

    Sizes are doubled from 2 to 2**most as long as twice the time, of the faster of two
    uses, is short enough.
    """
    for bits in range(1, most + 1):
        use = partial(make(2**bits), gradient)
        seconds = min(timeit.repeat(use, number=1, repeat=2))
        if seconds > longest_seconds:
            return bits - 1
        if 2 * seconds > longest_seconds:
            return bits
    return most


def dense_makers(arguments: Table11Arguments, in_size: int) -> dict[str, Make]:
    """The dense projections that there are."""
    makers: dict[str, Make] = {}
    if PEERS["traker"].version is not None:
        matrix_bytes = arguments.matrix_gib * 2**30
        makers["traker"] = partial(traker_projection, in_size, matrix_bytes)
    makers["dense"] = lambda out_size: partial(
        operator.matmul, Dense(in_size, out_size, seed=0)
    )
    return makers


def projections_of(
    makers: Mapping[str, Make], limits: Mapping[str, int], bits: list[int], in_size: int
) -> dict[str, dict[int, Projection]]:
    """What is timed: by name and log2 of the sketch size."""
    projections: dict[str, dict[int, Projection]] = {}
    for name, make in makers.items():
        limit = limits[name]
        sizes = {b for b in (*bits, limit) if 0 < b <= limit}
        projections[name] = {b: make(2**b) for b in sorted(sizes)}
    for name, (which, flat) in _SKETCHES.items():
        projections[name] = {
            b: partial(
                operator.matmul, choose_operator(which, in_size, 2**b, 0, "", flat)
            )
            for b in bits
        }
    return projections


def measure(
    projections: Mapping[str, Mapping[int, Projection]], gradient: Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, dict[int, dict[str, float]]]]:
    """The spread of a read of the gradient, and by name and bits of each projection."""
    actions: dict[str, Callable[[], Tensor]] = {"read": gradient.sum}
    for name, by_bits in projections.items():
        for bits, project in by_bits.items():
            actions[f"{name} 2^{bits}"] = partial(project, gradient)
    seconds = timed(actions, rounds)
    read = seconds["read"]
    norm = gradient.norm()
    costs: dict[str, dict[int, dict[str, float]]] = {}
    for name, by_bits in projections.items():
        costs[name] = {}
        for bits, project in by_bits.items():
            times = seconds[f"{name} 2^{bits}"]
            ratios = (a / b for a, b in zip(times, read, strict=True))
            costs[name][bits] = {
                **spread(times),
                "ratio_to_read": median(ratios),
                "squared_norm_ratio": float(project(gradient).norm() / norm) ** 2,
            }
    return spread(read), costs


def extrapolated(
    costs: Mapping[int, Mapping[str, float]], bits: list[int]
) -> dict[int, float]:
    """Seconds at the sizes above those measured, in proportion to the largest."""
    if not costs:
        return {}
    last = max(costs)
    longest = costs[last]["median_seconds"]
    return {b: longest * 2 ** (b - last) for b in bits if b > last}


def left_out_of(
    arguments: Table11Arguments, limits: Mapping[str, int], bits: list[int]
) -> list[str]:
    """One line for each thing that was not run, with the reason."""
    lines = []
    asked = sorted(set(map(int, arguments.bits.split(","))) - set(bits))
    if asked:
        lines.append(f"log2 sizes {asked}: not in [1, log2 of the elements]")
    if "traker" not in limits:
        lines.append("traker: not installed, pip install traker")
    for name, limit in limits.items():
        above = [b for b in bits if b > limit]
        if above:
            lines.append(
                f"{name} at log2 sizes {above}: a use takes more than longest_seconds="
                f"{arguments.longest_seconds:g} by a trial at 2^{max(limit, 1)}"
            )
    return lines


def print_table(arguments: Table11Arguments, results: Mapping[str, Any]) -> None:
    """Every projection beside the paper's."""
    print(
        f"Table 11: one gradient of a {arguments.model_type}; ms are medians "
        f"(least..greatest), here on {device_name()}, "
        f"{torch.get_num_threads()} threads,\nthe paper's on one V100, of another "
        f"model. The floor is one read of {results['gradient_bytes'] / 1e6:.4g} MB: "
        f"{milliseconds(results['read'])} ms"
    )
    if results["traker"]:
        print(f"traker {results['traker']}: BasicProjector, {_MOST_COLUMNS} columns")
    for name, costs in results["projections"].items():
        beyond = results["extrapolated_seconds"].get(name, {})
        for bits in sorted({*costs, *beyond}):
            if bits in costs:
                cost = costs[bits]
                ours = f"{milliseconds(cost)} ms, {cost['ratio_to_read']:.4g} reads"
            else:
                ours = f"~ {1e3 * beyond[bits]:.4g} ms, extrapolated"
                ours += f" from 2^{max(costs)}"
            print(
                f"  {name:14s} 2^{bits:<2d} {ours:44s} paper {_published(name, bits)}"
            )
    for line in results["left_out"]:
        print(f"  left out: {line}")


def _published(name: str, bits: int) -> str:
    """The paper's milliseconds."""
    cells = [
        f"{row} {figure} ms"
        for row, figures in PUBLISHED.items()
        for b, figure in enumerate(figures, start=12)
        if b == bits and name in _BESIDE[row]
    ]
    return ", ".join(cells) or "-"


def run_table11(arguments: Table11Arguments) -> dict[str, Any]:
    """Measure, print beside the paper's figures, and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, elements=2**13, bits="6,12", longest_seconds=0.1, rounds=1
        )
    gradient = model_gradient(
        arguments.model_type, arguments.elements or None, arguments.tiny
    )
    bits = fitting_bits(arguments.bits, len(gradient))
    makers = dense_makers(arguments, len(gradient))
    limits = {
        name: most_bits_in_time(make, gradient, max(bits), arguments.longest_seconds)
        for name, make in makers.items()
    }
    projections = projections_of(makers, limits, bits, len(gradient))
    read, costs = measure(projections, gradient, arguments.rounds)
    results = {
        "gradient_bytes": gradient.nbytes,
        "read": read,
        "projections": costs,
        "extrapolated_seconds": {
            name: extrapolated(costs[name], bits) for name in makers
        },
        "left_out": left_out_of(arguments, limits, bits),
        "traker": PEERS["traker"].version,
    }
    print_table(arguments, results)
    print("saved", save_report(arguments.output_dir, "table11", arguments, results))
    return results


if __name__ == "__main__":
    run_table11(*HfArgumentParser(Table11Arguments).parse_args_into_dataclasses())
