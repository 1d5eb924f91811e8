"""How often an eigenvalue lies within the error bars of its sketch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch, SketchedHessian, Spectrum, hessian_spectrum
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.dense_hessian import DenseHessian, tiny_model
from hf_sketch.recipes.tables.paper.table7 import largest
from hf_sketch.spectra.lanczos_run import lanczos

_TINY = {"width": 8, "out_size": 64, "seeds": 4, "steps": 20, "krylov_dim": 40}


@dataclass
class CoverageArguments(ReportArguments):
    """Coverage of the error bars of eigenvalues, against dense Hessians in float64."""

    models: str = field(default="gpt2,bert", metadata={"help": "Comma-separated."})
    operators: str = field(
        default="affd,srht,afjl,qk", metadata={"help": "Operators, comma-separated."}
    )
    out_size: int = field(default=256, metadata={"help": "Length of the sketch."})
    seeds: int = field(default=40, metadata={"help": "Seeds of each operator."})
    top: int = field(default=5, metadata={"help": "Eigenvalues compared, the largest."})
    krylov_dim: int = field(default=80, metadata={"help": "Lanczos steps."})
    width: int = field(default=16, metadata={"help": "Width of the models."})
    steps: int = field(default=30, metadata={"help": "Training steps beforehand."})
    tiny: bool = field(default=False, metadata={"help": "Small sizes, as a check."})


def scores(spectrum: Spectrum, truth: Tensor) -> Tensor:
    """Return the error of the largest eigenvalues in standard errors: (top,)."""
    count = len(truth)
    error = largest(spectrum.eigenvalues, count) - truth
    return error / largest(spectrum.standard_errors, count)


def exact_eigenvalues(hessian: DenseHessian, count: int) -> Tensor:
    """Return the largest eigenvalues, descending, to 1e-9 of the largest.

    Raises:
        RuntimeError: Lanczos has not converged.
    """
    found = lanczos(hessian, min(120, hessian.size), progress=False)
    if largest(found.residuals, count).max() > 1e-9 * found.eigenvalues[-1]:
        raise RuntimeError("The exact eigenvalues have not converged.")
    return largest(found.eigenvalues, count)


def spectra_of(
    hessian: DenseHessian, operator: str, arguments: CoverageArguments
) -> list[Spectrum]:
    """Return the spectra of sketches with different seeds."""
    model = hessian.mean_loss.model
    return [
        hessian_spectrum(
            SketchedHessian(
                hessian,
                ModelSketch.from_model(
                    model, arguments.out_size, "blocked", seed, operator
                ),
            ),
            arguments.krylov_dim,
            seed=seed,
            progress=False,
        )
        for seed in tqdm(range(arguments.seeds), desc=operator)
    ]


def summary_of(spectra: list[Spectrum], truth: Tensor) -> dict[str, Any]:
    """Return the parts of scores within one and two errors, and the mean error.

    With "gaussian" come those of bars that take the scatter of a Gaussian matrix for
    that of the operator.
    """
    own = torch.stack([scores(s, truth) for s in spectra])
    plain = [dataclasses.replace(s, scatter=None) for s in spectra]
    gaussian = torch.stack([scores(s, truth) for s in plain])
    found = torch.stack([largest(s.eigenvalues, len(truth)) for s in spectra])
    return {
        "within": [float((own.abs() < k).double().mean()) for k in (1, 2)],
        "gaussian": [float((gaussian.abs() < k).double().mean()) for k in (1, 2)],
        "error": float(((found - truth) / truth).abs().mean()),
        "scores": own.tolist(),
    }


def run_coverage(arguments: CoverageArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, **_TINY)
    results: dict[str, Any] = {}
    for name in arguments.models.split(","):
        model, batch = tiny_model(name, arguments.width, arguments.steps)
        hessian = DenseHessian(model, [batch])
        truth = exact_eigenvalues(hessian, arguments.top)
        print(f"{name}: {hessian.size} elements, {truth.tolist()}")
        results[name] = {"exact": truth.tolist(), "size": hessian.size}
        for operator in arguments.operators.split(","):
            cell = summary_of(spectra_of(hessian, operator, arguments), truth)
            results[name][operator] = cell
            one, two = cell["within"]
            before, before_two = cell["gaussian"]
            print(
                f"  {operator:5s} within 1: {one:.0%}, 2: {two:.1%}; with bars of a "
                f"Gaussian matrix {before:.0%}, {before_two:.1%}; mean absolute error "
                f"{cell['error']:.3f}",
                flush=True,
            )
    print("saved", save_report(arguments.output_dir, "coverage", arguments, results))
    return results


if __name__ == "__main__":
    run_coverage(*HfArgumentParser(CoverageArguments).parse_args_into_dataclasses())
