"""Table 7: the least sketch size that keeps the largest eigenvalues of a Hessian."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import HessianOperator, ModelSketch, SketchedHessian, hessian_spectrum
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.gradients import fine_tuned_minilm
from hf_sketch.recipes.tables.models.hessians import (
    FlatHessian,
    entailment_batches,
    relative_error,
)
from hf_sketch.spectra.lanczos_run import lanczos

# Least log2 of the size for an error < 0.2, 0.1, 0.05 (Schioppa 2024, Table 7).
PAPER = {"affd": (9, 10, 10), "afjl": (12, 12, 12), "qk": (13, 13, 13)}
LEVELS = (0.2, 0.1, 0.05)


@dataclass
class Table7Arguments(ReportArguments):
    """Error of sketched eigenvalues by sketch size, on MiniLM and pairs."""

    operators: str = field(
        default="affd,afjl,qk,srht", metadata={"help": "Operators, comma-separated."}
    )
    bits: str = field(
        default="8,9,10,11,12", metadata={"help": "log2 of the sketch sizes."}
    )
    top: int = field(default=10, metadata={"help": "Eigenvalues compared."})
    krylov_dim: int = field(default=40, metadata={"help": "Lanczos steps in a sketch."})
    exact_steps: int = field(
        default=60, metadata={"help": "Lanczos steps without a sketch."}
    )
    seeds: int = field(default=3, metadata={"help": "Seeds; the median is taken."})
    examples: int = field(default=16, metadata={"help": "Pairs of the Hessian."})
    steps: int = field(default=100, metadata={"help": "Fine-tuning steps beforehand."})
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows instead of our own pairs."}
    )


def largest(eigenvalues: Tensor, count: int) -> Tensor:
    """The greatest eigenvalues, descending."""
    return eigenvalues.flip(0)[:count]


def measure(arguments: Table7Arguments) -> dict[str, Any]:
    """Errors for each operator, size and seed, as sketched and without the shift."""
    model = fine_tuned_minilm(arguments.steps, 0, arguments.train_file)
    batches = entailment_batches(arguments.examples, 16, arguments.train_file)
    hessian = HessianOperator(model, batches)
    exact = lanczos(FlatHessian(hessian), arguments.exact_steps)
    truth = largest(exact.eigenvalues, arguments.top)
    errors: dict[str, dict[int, dict[str, list[float]]]] = {}
    for operator in arguments.operators.split(","):
        errors[operator] = {}
        for bits in map(int, arguments.bits.split(",")):
            cell: dict[str, list[float]] = {"sketched": [], "corrected": [], "z": []}
            for seed in tqdm(range(arguments.seeds), desc=f"{operator} 2^{bits}"):
                sketch = ModelSketch.from_model(
                    model, 2**bits, "blocked", seed, operator
                )
                spectrum = hessian_spectrum(
                    SketchedHessian(hessian, sketch),
                    arguments.krylov_dim,
                    progress=False,
                )
                for name in ("sketched", "eigenvalues"):
                    got = largest(getattr(spectrum, name), arguments.top)
                    key = "sketched" if name == "sketched" else "corrected"
                    cell[key].append(relative_error(got, truth))
                z = (spectrum.eigenvalues.flip(0)[: arguments.top] - truth) / (
                    spectrum.standard_errors.flip(0)[: arguments.top]
                )
                cell["z"].append(float(z.square().mean().sqrt()))
            errors[operator][bits] = cell
    check = hessian.check
    return {
        "elements": sum(p.numel() for p in hessian.parameters.values()),
        "exact": truth.tolist(),
        "residuals": largest(exact.residuals, arguments.top).tolist(),
        "check": None if check is None else vars(check),
        "errors": errors,
    }


def least_bits(by_bits: dict[int, dict[str, list[float]]], level: float) -> int | None:
    """The least size from which on the median corrected error stays below a level."""
    enough = None
    for bits in sorted(by_bits, reverse=True):
        if median(by_bits[bits]["corrected"]) >= level:
            break
        enough = bits
    return enough


def run_table7(arguments: Table7Arguments) -> dict[str, Any]:
    """Measure, print beside the paper's figures, and save."""
    results = measure(arguments)
    largest_residual = max(results["residuals"])
    print(
        f"exact top {arguments.top}: "
        f"{', '.join(f'{value:.4g}' for value in results['exact'])}; residuals up to "
        f"{largest_residual:.2g}\n"
        "relative mean absolute error, median over the seeds: as sketched -> without "
        "the shift tr(H)/D (z: error over standard error, root mean square)"
    )
    for operator, by_bits in results["errors"].items():
        cells = [
            f"2^{bits} {median(cell['sketched']):.3f} -> "
            f"{median(cell['corrected']):.3f} (z {median(cell['z']):.1f})"
            for bits, cell in by_bits.items()
        ]
        print(f"  {operator:5s} {'  '.join(cells)}")
    print("least log2 of the size for an error < 0.2 / 0.1 / 0.05, and the paper's")
    for operator, by_bits in results["errors"].items():
        ours = [least_bits(by_bits, level) for level in LEVELS]
        print(f"  {operator:5s} {ours}  paper {PAPER.get(operator)}")
    print("saved", save_report(arguments.output_dir, "table7", arguments, results))
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    run_table7(*HfArgumentParser(Table7Arguments).parse_args_into_dataclasses())
