"""A long Lanczos run in a large sketch: time, memory, and loss of orthogonality."""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from transformers import HfArgumentParser

from hf_sketch import HessianOperator, ModelSketch, SketchedHessian, lanczos
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.hessians import random_tokens
from hf_sketch.recipes.tables.paper.table9 import small_gpt2


@dataclass
class LongLanczosArguments(ReportArguments):
    """The paper's number of Lanczos steps and sketch size, on a small GPT-2."""

    steps: int = field(default=1000, metadata={"help": "Lanczos steps."})
    bits: int = field(default=20, metadata={"help": "log2 of the sketch size."})
    layout: str = field(default="flat", metadata={"help": "Layout of the sketch."})
    basis_file: str | None = field(
        default=None, metadata={"help": "Keeps the basis on disk instead of memory."}
    )
    tiny: bool = field(default=False, metadata={"help": "A short run, as a check."})


def run_long_lanczos(arguments: LongLanczosArguments) -> dict[str, Any]:
    """Run, print and save."""
    width = 128
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, steps=10, bits=10)
        width = 16
    model = small_gpt2(layers=2, width=width)
    hessian = HessianOperator(model, random_tokens(model, 1, 16))
    sketch = ModelSketch.from_model(
        model, 2**arguments.bits, arguments.layout, operator="affd"
    )
    operator = SketchedHessian(hessian, sketch)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    found = lanczos(operator, arguments.steps, basis_file=arguments.basis_file)
    seconds = time.perf_counter() - start
    loss = found.loss_of_orthogonality
    numbers = found.steps * operator.size
    results = {
        "elements": sketch.in_size,
        "steps": found.steps,
        "seconds": seconds,
        # Each vector meets all before it four times: products and sums, twice.
        "read_bytes": 8 * numbers * (found.steps + 1),
        "basis_bytes": 4 * numbers,
        "resident_extra_bytes": psutil.Process().memory_info().rss - before,
        "loss_of_orthogonality": loss,
        "eigenvalues": [float(found.eigenvalues[0]), float(found.eigenvalues[-1])],
        "residuals": [float(found.residuals[0]), float(found.residuals[-1])],
    }
    print(
        f"{sketch.in_size:,} elements, {found.steps} steps in R^(2^{arguments.bits}): "
        f"{seconds:.0f} s, basis {results['basis_bytes'] / 2**30:.2f} GiB, resident "
        f"memory +{results['resident_extra_bytes'] / 2**30:.2f} GiB, loss of "
        f"orthogonality {loss:.2g}"
    )
    path = save_report(arguments.output_dir, "long_lanczos", arguments, results)
    print("saved", path)
    return results


if __name__ == "__main__":
    run_long_lanczos(
        *HfArgumentParser(LongLanczosArguments).parse_args_into_dataclasses()
    )
