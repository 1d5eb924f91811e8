"""Tables 3, 4 and 8: what each operator costs, explicit and implicit, by its mix."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Sketch
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import milliseconds, operator_costs
from hf_sketch.recipes.tables.models.language_model import model_gradient
from hf_sketch.recipes.tables.speed_ups import (
    PUBLISHED,
    PUBLISHED_SPEED_UPS,
    Row,
    is_in_table_3,
    speed_ups,
)
from hf_sketch.sketches import Transposed

_MIXED = {"fjl": FJL, "affd": AFFD, "afjl": AFJL}
_SRHT_BLOCK = 2**10  # the block of ModelSketch's default layout


@dataclass
class Table8Arguments(ReportArguments):
    """Wall time and extra memory of each operator on one gradient of a model.

    The gradient is one vector, as in the paper. Only the sketch is measured, and both
    modes start from the same gradient g: explicit is S g, implicit the gradient in
    omega, at 0, of the linear loss <g, theta + S.T omega>, whose gradient in theta is
    g. In the paper the loss is the model's own; its forward and backward pass would
    add the same to both.
    """

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    elements: int = field(
        default=2**22,
        metadata={"help": "How much of the model's gradient is used; 0 for all of it."},
    )
    bits: int = field(default=17, metadata={"help": "log2 of the sketch size."})
    rounds: int = field(default=5, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def explicit(operator: Sketch, gradient: Tensor) -> Tensor:
    """S g."""
    return operator @ gradient


def implicit(operator: Sketch, gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient in omega of <g, weights + S.T omega> at 0, by autograd."""
    omega = gradient.new_zeros(operator.shape[0]).requires_grad_()
    loss = gradient @ (weights + Product.apply(omega, operator.T))
    (sketch,) = torch.autograd.grad(loss, omega)
    return sketch


class Product(torch.autograd.Function):
    """An operator @ x; its derivative is the operator's transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Sketch | Transposed) -> Tensor:
        ctx.operator = operator
        return operator @ x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return Product.apply(grad_output, ctx.operator.T), None


def operators_of(in_size: int, out_size: int) -> dict[tuple[str, str], Sketch]:
    """By algorithm and mix: those of Table 8 that there are, and SRHT.

    FFD has no other mix here.
    """
    sizes = (in_size, out_size, 0)
    operators: dict[tuple[str, str], Sketch] = {
        (algorithm, mix): _MIXED[algorithm](*sizes, mix=mix)
        for algorithm, mode, mix in PUBLISHED
        if mode == "explicit" and algorithm in _MIXED
    }
    return operators | {
        ("ffd", "hadamard"): FFD(*sizes),
        ("qk", "kronecker"): QK(*sizes),
        ("srht", "hadamard"): SRHT(*sizes),
        ("srht in blocks", "hadamard"): SRHT(*sizes, block_size=_SRHT_BLOCK),
    }


def run_table8(arguments: Table8Arguments) -> dict[str, dict[str, float]]:
    """Measure, print beside the paper's figures, and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, elements=2**12, bits=8, rounds=1)
    gradient = model_gradient(
        arguments.model_type, arguments.elements or None, arguments.tiny
    )
    modes: dict[str, Callable[[Sketch], Tensor]] = {
        "explicit": partial(explicit, gradient=gradient),
        "implicit": partial(
            implicit, gradient=gradient, weights=torch.zeros_like(gradient)
        ),
    }
    most = len(gradient).bit_length() - 1
    if not 0 <= arguments.bits <= most:
        raise ValueError(
            f"bits must be in [0, {most}] for {len(gradient)} elements, got "
            f"{arguments.bits}: pass --bits {most} or less."
        )
    operators = operators_of(len(gradient), 2**arguments.bits)
    cases: dict[Row, tuple[Sketch, Callable[[Sketch], Tensor]]] = {
        (algorithm, mode, mix): (operator, use)
        for (algorithm, mix), operator in operators.items()
        for mode, use in modes.items()
    }
    named = {"/".join(row): case for row, case in cases.items()}
    results = operator_costs(named, arguments.rounds)
    costs = dict(zip(cases, results.values(), strict=True))
    print_costs(costs, len(gradient), arguments.bits)
    ratios = speed_ups({row: cost["median_seconds"] for row, cost in costs.items()})
    print_speed_ups(ratios)
    saved = {
        "costs": results,
        "speed_ups": {"/".join(key): ratio for key, ratio in ratios.items()},
    }
    print("saved", save_report(arguments.output_dir, "table8", arguments, saved))
    return saved


def print_costs(
    costs: Mapping[Row, Mapping[str, float]], elements: int, bits: int
) -> None:
    """Table 8 and, from it, Table 3."""
    print(
        f"{elements:,} elements, sketches of 2^{bits}; ours: ms, "
        "median (least..greatest), and MiB beyond gradient and weights\n"
        "the paper's: ms and GB in all, of a GPT-2 on one V100 | on a TPUv2. Another "
        "machine, model and\nsize: compare rows within a column, not columns"
    )
    print("Table 8")
    for row, cost in costs.items():
        print(_line(row, cost))
    print("Table 3")
    for row, cost in costs.items():
        if is_in_table_3(row):
            print(_line(row, cost))


def print_speed_ups(ratios: Mapping[tuple[str, str], float]) -> None:
    """Table 4."""
    print("Table 4: how many times faster; the paper's on one V100 | on a TPUv2")
    for (change, algorithm), ratio in ratios.items():
        published = PUBLISHED_SPEED_UPS.get((change, algorithm))
        paper = "{:.2f} | {:.2f}".format(*published) if published else "-"
        print(f"  {change:22s} {algorithm:15s} {ratio:5.2f}  paper {paper}")


def _line(row: Row, cost: Mapping[str, float]) -> str:
    """One row of ours beside the paper's."""
    published = PUBLISHED.get(row)
    paper = "-"
    if published:
        cells = ["-" if figure is None else f"{figure:g}" for figure in published]
        paper = f"{cells[0]} ms {cells[1]} GB | {cells[2]} ms {cells[3]} GB"
    ours = f"{milliseconds(cost)} ms {cost['extra_peak_bytes'] / 2**20:.1f} MiB"
    return f"  {' '.join(row):33s} {ours:38s} paper {paper}"


if __name__ == "__main__":
    run_table8(*HfArgumentParser(Table8Arguments).parse_args_into_dataclasses())
