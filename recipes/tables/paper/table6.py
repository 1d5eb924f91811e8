"""Table 6: the least sketch size that keeps inner products of gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import ModelSketch
from hf_sketch.examples.measured_error import top_found
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.gradient_tasks import (
    GradientTask,
    language_task,
    snli_task,
)
from hf_sketch.sketches.choices import check_choice

# Least log2 of the size for r > 0.95, 0.98, 0.99 (Schioppa 2024, Table 6).
PAPER = {
    "fjl": (10, 12, 13),
    "affd": (10, 12, 13),
    "afjl": (12, 13, 15),
    "qk": (14, 16, 17),
    "ffd": (10, 12, 14),
}
LEVELS = (0.95, 0.98, 0.99)
TASKS = ("snli", "masked", "causal")
TOP = 10
_ROWS_AT_ONCE = 8  # the random numbers of an operator serve all of them

Cell = dict[str, list[float]]


@dataclass
class Table6Arguments(ReportArguments):
    """Error of sketched inner products of gradients, by layout, operator and size."""

    task: str = field(
        default="masked",
        metadata={
            "help": "snli (MiniLM classifies pairs), masked (MiniLM predicts masked "
            "tokens) or causal (the next token; needs --model_name_or_path)."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Language model of masked or causal."}
    )
    text_file: str | None = field(
        default=None,
        metadata={
            "help": "Passages for masked and causal: .txt, or .jsonl or .csv with a "
            "column text, optionally with .gz; by default premises of our own pairs."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens kept per passage."})
    sketches: str = field(
        default="grouped/srht,factored/srht,blocked/srht,blocked/affd,blocked/afjl,"
        "blocked/qk,blocked/fjl,blocked/ffd,flat/qk",
        metadata={"help": "Layouts and operators, layout/operator, comma-separated."},
    )
    bits: str = field(default="10,12", metadata={"help": "log2 of the sketch sizes."})
    examples: int = field(default=48, metadata={"help": "Gradients to compare."})
    seeds: int = field(default=3, metadata={"help": "Seeds per sketch and size."})
    steps: int = field(default=60, metadata={"help": "Fine-tuning steps beforehand."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "SNLI rows for snli; by default our own pairs."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, for the gradients compared."}
    )


def pearson_r(exact: Tensor, rows: Tensor) -> float:
    """Correlation of the inner products of different rows with the exact ones.

    Shapes:
        exact (n, n), rows (n, out_size)
    """
    pairs = torch.triu_indices(len(exact), len(exact), offset=1)
    products = (rows.double() @ rows.double().T)[pairs[0], pairs[1]]
    both = torch.stack([exact[pairs[0], pairs[1]].double(), products])
    return float(torch.corrcoef(both)[0, 1])


def accuracy(exact: Tensor, rows: Tensor) -> dict[str, float]:
    """Return the figures of merit of sketched inner products.

    Shapes:
        exact (n, n), rows (n, out_size)

    Returns:
        pearson_r of different rows; rms_error, the root mean square of their error
        divided by the product of the exact norms; top_found, the share of each row's
        exact top 10 others that is in its sketched top 10.
    """
    got, count = rows.double() @ rows.double().T, len(exact)
    norms = exact.diagonal().sqrt()
    errors = ((got - exact) / torch.outer(norms, norms)).fill_diagonal_(0)
    return {
        "pearson_r": pearson_r(exact, rows),
        "rms_error": float(errors.square().sum() / (count * (count - 1))) ** 0.5,
        "top_found": top_found(exact, got, min(TOP, count - 1)),
    }


def measure(
    task: GradientTask, arguments: Table6Arguments
) -> dict[str, dict[int, Cell]]:
    """The figures of each sketch and size, one per seed."""
    bits = [int(b) for b in arguments.bits.split(",")]
    sketches: dict[tuple[str, int, int], ModelSketch] = {}
    for name in arguments.sketches.split(","):
        layout, operator = name.split("/")
        for b, seed in product(bits, range(arguments.seeds)):
            sketches[name, b, seed] = ModelSketch.from_model(
                task.model, 2**b, layout, seed, operator
            )
    rows: dict[tuple[str, int, int], list[Tensor]] = {key: [] for key in sketches}
    for gradients in task.gradients(_ROWS_AT_ONCE):
        for key, sketch in sketches.items():
            rows[key].append(sketch.sketch_rows(gradients))
    exact = task.exact_products()
    results: dict[str, dict[int, Cell]] = {}
    for (name, b, _), parts in rows.items():
        cell = results.setdefault(name, {}).setdefault(b, {})
        for figure, value in accuracy(exact, torch.cat(parts)).items():
            cell.setdefault(figure, []).append(value)
    return results


def least_bits(by_bits: Mapping[int, Cell], level: float) -> int | None:
    """The least size from which on the median r stays above a level, if any."""
    enough = None
    for bits in sorted(by_bits, reverse=True):
        if median(by_bits[bits]["pearson_r"]) <= level:
            break
        enough = bits
    return enough


def run_table6(arguments: Table6Arguments) -> dict[str, Any]:
    """Measure, print beside the paper's figures, and save.

    Raises:
        ValueError: the task is unknown, lacks its model, or lacks passages.
    """
    check_choice("task", arguments.task, TASKS)
    if arguments.task == "snli":
        task = snli_task(
            arguments.examples,
            arguments.steps,
            arguments.train_file,
            arguments.validation_file,
        )
    else:
        task = language_task(
            arguments.task == "masked",
            arguments.model_name_or_path,
            arguments.text_file,
            arguments.max_length,
            arguments.examples,
            arguments.steps,
        )
    results = measure(task, arguments)
    _print(results)
    name = f"table6_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _print(results: Mapping[str, Mapping[int, Cell]]) -> None:
    """Every cell, then the least sizes."""
    print(
        "mean (least..greatest over the seeds) of r, of the root mean square error "
        f"over the product of the norms, and of the share of the exact top {TOP} found"
    )
    for name, by_bits in results.items():
        for bits, cell in by_bits.items():
            parts = (
                f"{mean(values):.4f} ({min(values):.4f}..{max(values):.4f})"
                for values in cell.values()
            )
            print(f"  {name:18s} 2^{bits:<3d} {'  '.join(parts)}")
    print("least log2 of the size for r > 0.95 / 0.98 / 0.99, and the paper's")
    for name, by_bits in results.items():
        ours = [least_bits(by_bits, level) for level in LEVELS]
        print(f"  {name:18s} {ours}  paper {PAPER.get(name.split('/')[1])}")


if __name__ == "__main__":
    run_table6(*HfArgumentParser(Table6Arguments).parse_args_into_dataclasses())
