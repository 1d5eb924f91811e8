"""Table 6: the least sketch size that keeps inner products of gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.gradients import (
    as_mapping,
    fine_tuned_minilm,
    per_example_gradients,
)
from hf_sketch.sketches.by_name import choose_operator

# Least log2 of the size for r > 0.95, 0.98, 0.99 (Schioppa 2024, Table 6).
PAPER = {
    "fjl": (10, 12, 13),
    "affd": (10, 12, 13),
    "afjl": (12, 13, 15),
    "qk": (14, 16, 17),
    "ffd": (10, 12, 14),
}
LEVELS = (0.95, 0.98, 0.99)
_ROWS_AT_ONCE = 16  # the random numbers of an operator serve all of them
_WIDER = 4


@dataclass
class Table6Arguments(ReportArguments):
    """Pearson r of sketched inner products by sketch size, on MiniLM and SNLI."""

    sketches: str = field(
        default="blocked/srht,factored/srht,affd@factored/srht,blocked/affd,"
        "blocked/afjl,blocked/qk,flat/qk,blocked/fjl,blocked/ffd",
        metadata={
            "help": "Layouts and operators, as layout/operator, comma-separated; with "
            "affd@ in front, AFFD of a sketch four times as long."
        },
    )
    bits: str = field(
        default="8,10,11,12,13,14,15,16,17",
        metadata={"help": "log2 of the sketch sizes."},
    )
    examples: int = field(default=80, metadata={"help": "Gradients to compare."})
    seeds: int = field(default=5, metadata={"help": "Seeds; the median is taken."})
    steps: int = field(default=60, metadata={"help": "Fine-tuning steps beforehand."})


def pearson_r(exact: Tensor, rows: Tensor) -> float:
    """Correlation of the inner products of different rows with the exact ones.

    Shapes:
        exact (n, n), rows (n, out_size)
    """
    pairs = torch.triu_indices(len(exact), len(exact), offset=1)
    products = (rows.double() @ rows.double().T)[pairs[0], pairs[1]]
    both = torch.stack([exact[pairs[0], pairs[1]].double(), products])
    return float(torch.corrcoef(both)[0, 1])


def sketcher(
    name: str, model: nn.Module, out_size: int, seed: int
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """What sketches rows of gradients of a model, by the name that the flag takes."""
    stages = name.split("@")
    layout, operator = stages[-1].split("/")
    inner_size = out_size * _WIDER ** (len(stages) - 1)
    inner = ModelSketch.from_model(model, inner_size, layout, seed, operator)
    if len(stages) == 1:
        return inner.sketch_rows
    outer = choose_operator(stages[0], inner_size, out_size, seed, "", flat=True)
    return lambda rows: inner.sketch_rows(rows) @ outer.T


def measure(
    model: nn.Module, gradients: Tensor, arguments: Table6Arguments
) -> dict[str, dict[int, list[float]]]:
    """R for each sketch, size and seed."""
    exact = gradients @ gradients.T
    results: dict[str, dict[int, list[float]]] = {}
    for name in arguments.sketches.split(","):
        results[name] = {}
        for bits in map(int, arguments.bits.split(",")):
            results[name][bits] = []
            for seed in tqdm(range(arguments.seeds), desc=f"{name} 2^{bits}"):
                sketch = sketcher(name, model, 2**bits, seed)
                rows = torch.cat(
                    [
                        sketch(as_mapping(model, some))
                        for some in gradients.split(_ROWS_AT_ONCE)
                    ]
                )
                results[name][bits].append(pearson_r(exact, rows))
    return results


def least_bits(by_bits: dict[int, list[float]], level: float) -> int | None:
    """The least size from which on the median r stays above a level, if any."""
    enough = None
    for bits in sorted(by_bits, reverse=True):
        if median(by_bits[bits]) <= level:
            break
        enough = bits
    return enough


def run_table6(arguments: Table6Arguments) -> dict[str, dict[int, list[float]]]:
    """Measure, print beside the paper's figures, and save."""
    model = fine_tuned_minilm(arguments.steps, seed=0)
    gradients = per_example_gradients(model, arguments.examples)
    results = measure(model, gradients, arguments)
    print("median r (least..greatest over the seeds) by log2 of the sketch size")
    for name, by_bits in results.items():
        cells = [
            f"2^{bits} {median(r):.3f} ({min(r):.3f}..{max(r):.3f})"
            for bits, r in by_bits.items()
        ]
        print(f"  {name:18s} {'  '.join(cells)}")
    print("least log2 of the size for r > 0.95 / 0.98 / 0.99, and the paper's")
    for name, by_bits in results.items():
        ours = [least_bits(by_bits, level) for level in LEVELS]
        print(f"  {name:18s} {ours}  paper {PAPER.get(name.split('/')[1])}")
    print("saved", save_report(arguments.output_dir, "table6", arguments, results))
    return results


if __name__ == "__main__":
    run_table6(*HfArgumentParser(Table6Arguments).parse_args_into_dataclasses())
