"""The eigenvalue half of Tables 1 and 5: a layer's spectrum beside the model's."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_sketch import (
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    lanczos,
)
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.gradients import fine_tuned_minilm
from hf_sketch.recipes.tables.models.hessians import (
    FlatHessian,
    entailment_batches,
    relative_error,
)

# Least and greatest error of a layer (Schioppa 2024, Tables 1 and 5).
PAPER = {"GPT-2": (0.19, 0.72), "BART": (0.16, 0.59)}


@dataclass
class Table1EigenvaluesArguments(ReportArguments):
    """Error of the top eigenvalues of single layers, and of a sketch of all of them."""

    top: int = field(default=10, metadata={"help": "Eigenvalues compared."})
    krylov_dim: int = field(default=40, metadata={"help": "Lanczos steps of each."})
    bits: int = field(default=12, metadata={"help": "log2 of the sketch size."})
    examples: int = field(default=16, metadata={"help": "Pairs of the Hessian."})
    steps: int = field(default=100, metadata={"help": "Fine-tuning steps beforehand."})
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows instead of our own pairs."}
    )


def layers_of(model: nn.Module) -> dict[str, str]:
    """The parts that are compared, and the prefixes of their parameters.

    The layers are the members of the model's longest lists of modules.
    """
    token = model.get_input_embeddings()
    embedding = next(name for name, module in model.named_modules() if module is token)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    longest = max(map(len, lists.values()))
    stacks = [name for name, blocks in lists.items() if len(blocks) == longest]
    layers = {"token embedding": f"{embedding}."}
    for name in stacks:
        label = "layer" if len(stacks) == 1 else f"{name.split('.')[-2]} layer"
        layers |= {f"{label} {n + 1}": f"{name}.{n}." for n in range(longest)}
    return layers


def fitted(part: Tensor, whole: Tensor) -> Tensor:
    """The image of `part` nearest to `whole` under x -> a x + b with a >= 0."""
    centred, target = part - part.mean(), whole - whole.mean()
    slope = max(float(centred @ target / centred.square().sum()), 0.0)
    return slope * centred + whole.mean()


def top_eigenvalues(
    model: nn.Module, prefix: str, arguments: Table1EigenvaluesArguments
) -> Tensor:
    """Of the Hessian in the parameters whose names start with a prefix, descending."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    batches = entailment_batches(arguments.examples, 16, arguments.train_file)
    hessian = HessianOperator(model, batches, self_check=False)
    found = lanczos(FlatHessian(hessian), arguments.krylov_dim)
    return found.eigenvalues.flip(0)[: arguments.top]


def run_table1_eigenvalues(arguments: Table1EigenvaluesArguments) -> dict[str, Any]:
    """Measure, print beside the paper's figures, and save."""
    model = fine_tuned_minilm(arguments.steps, 0, arguments.train_file)
    whole = top_eigenvalues(model, "", arguments)
    sketch = ModelSketch.from_model(model, 2**arguments.bits, operator="affd")
    batches = entailment_batches(arguments.examples, 16, arguments.train_file)
    hessian = HessianOperator(model, batches)
    spectrum = hessian_spectrum(SketchedHessian(hessian, sketch), arguments.krylov_dim)
    ours = spectrum.eigenvalues.flip(0)[: arguments.top]
    errors = {f"AFFD sketch of 2^{arguments.bits}": relative_error(ours, whole)}
    errors |= {
        name: relative_error(
            fitted(top_eigenvalues(model, prefix, arguments), whole), whole
        )
        for name, prefix in layers_of(model).items()
    }
    print("relative mean absolute error of the top eigenvalues; layers' after a fit")
    for name, error in errors.items():
        print(f"  {name:20s} {error:.3f}")
    for name, (least, greatest) in PAPER.items():
        print(f"  the paper's layers of {name}: {least} to {greatest}")
    results = {"whole": whole.tolist(), "errors": errors}
    path = save_report(arguments.output_dir, "table1_eigenvalues", arguments, results)
    print("saved", path)
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    run_table1_eigenvalues(
        *HfArgumentParser(Table1EigenvaluesArguments).parse_args_into_dataclasses()
    )
