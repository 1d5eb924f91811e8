"""Table 2: dense projections run out of memory."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import (
    milliseconds,
    peak_extra_bytes,
    spread,
    timed,
)
from hf_sketch.recipes.tables.models.language_model import (
    fill_gradients,
    flat_gradient,
    random_language_model,
)
from hf_sketch.sketches.by_name import choose_operator

# Schioppa 2024, Table 2: largest number of rows and milliseconds of a pass on one V100,
# of the token embedding and of layers 1 to 6.
PUBLISHED = (
    (32, 31.2),
    *((128, milliseconds) for milliseconds in (25.1, 24.4, 23.9, 23.1, 22.4, 21.7)),
)
OUT_SIZE = 2**12


@dataclass
class Table2Arguments(ReportArguments):
    """The largest dense projection of each group of a model that fits the memory.

    A pass draws the rows of a float32 Gaussian matrix in place and applies them to the
    group's gradient: every pass needs new rows. The number of rows is doubled until
    the matrix, really drawn and applied, takes more than the memory.
    """

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    memory_gib: float = field(
        default=2.0,
        metadata={"help": "Memory for the matrix and its result; twice it is tried."},
    )
    rounds: int = field(default=3, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model, one round and 8 MiB."}
    )


def layer_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of the token embedding and of each block, by name."""
    groups = {"token embedding": list(model.get_input_embeddings().parameters())}
    outermost = ""
    for name, module in model.named_modules():
        inside = outermost and name.startswith(f"{outermost}.")
        if isinstance(module, nn.ModuleList) and not inside:
            outermost = name
            for number, block in module.named_children():
                groups[f"{name}.{number}"] = list(block.parameters())
    return groups


def project(rows: int, gradient: Tensor) -> Tensor:
    """Draw `rows` rows of a Gaussian matrix and apply them."""
    return torch.randn(rows, len(gradient), device=gradient.device) @ gradient


def largest_rows(gradient: Tensor, memory_bytes: int) -> int:
    """The largest power of two of rows that fit, each tried; 0 if not even one does."""
    rows = 1
    while peak_extra_bytes(partial(project, rows, gradient)) <= memory_bytes:
        rows *= 2
    return rows // 2


def dense_seconds(rows: int, pass_seconds: float, out_size: int) -> float:
    """Seconds of a sketch in passes of `rows` rows."""
    return math.ceil(out_size / rows) * pass_seconds


def measure_group(gradient: Tensor, memory_bytes: int, rounds: int) -> dict[str, Any]:
    """The largest dense projection of a gradient and its time, beside SRHT's."""
    rows = largest_rows(gradient, memory_bytes)
    if rows == 0:
        # A row of float32 and its result, rounded up as the allocator does.
        needed = math.ceil(1000 * (4 * len(gradient) + 128) / 2**30) / 1000
        raise ValueError(
            f"memory_gib must hold a row of {len(gradient)} elements, got "
            f"{memory_bytes / 2**30:g}: pass --memory_gib {needed:g} or more."
        )
    srht = choose_operator("srht", len(gradient), OUT_SIZE, 0, "", flat=False)
    matrix = gradient.new_empty(rows, len(gradient))
    actions = {
        "pass": lambda: matrix.normal_() @ gradient,
        "product": lambda: matrix @ gradient,
        "srht": lambda: srht @ gradient,
    }
    seconds = {name: spread(times) for name, times in timed(actions, rounds).items()}
    return {
        "elements": len(gradient),
        "rows": rows,
        "passes": math.ceil(OUT_SIZE / rows),
        **seconds,
        "dense_seconds": dense_seconds(
            rows, seconds["pass"]["median_seconds"], OUT_SIZE
        ),
    }


def run_table2(arguments: Table2Arguments) -> dict[str, dict[str, Any]]:
    """Measure, print beside the paper's figures, and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, memory_gib=2**-7, rounds=1)
    model = random_language_model(arguments.model_type, arguments.tiny)
    fill_gradients(model)
    memory_bytes = int(arguments.memory_gib * 2**30)
    print(
        f"Table 2: a dense projection to 2^12 in {arguments.memory_gib:g} GiB, and "
        "SRHT; ms are medians (least..greatest).\n"
        "The paper's: one V100, a GPT-2 whose groups follow ours in the same order"
    )
    results: dict[str, dict[str, Any]] = {}
    for place, (name, parameters) in enumerate(layer_groups(model).items()):
        gradient = flat_gradient(parameters)
        results[name] = measure_group(gradient, memory_bytes, arguments.rounds)
        print_group(name, results[name], place)
    print("saved", save_report(arguments.output_dir, "table2", arguments, results))
    return results


def print_group(name: str, result: Mapping[str, Any], place: int) -> None:
    """One row of ours beside the paper's."""
    paper = "-"
    if place < len(PUBLISHED):
        rows, pass_ms = PUBLISHED[place]
        whole = dense_seconds(rows, pass_ms / 1e3, OUT_SIZE)
        paper = f"k={rows} {pass_ms} ms, {whole:.2f} s"
    print(
        f"  {name:16s} {result['elements']:>11,d} k={result['rows']} "
        f"{milliseconds(result['pass'])} ms x {result['passes']} = "
        f"{result['dense_seconds']:.2f} s; paper {paper}\n"
        f"  {'':16s} SRHT {milliseconds(result['srht'])} ms; a pass of rows drawn "
        f"before {milliseconds(result['product'])} ms"
    )


if __name__ == "__main__":
    run_table2(*HfArgumentParser(Table2Arguments).parse_args_into_dataclasses())
