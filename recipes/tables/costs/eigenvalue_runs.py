"""The largest eigenvalues of one Hessian by several packages, with time and memory."""

import importlib
import time
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch import (
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    lanczos,
)
from hf_sketch.recipes.tables.measure import peak_extra_bytes
from hf_sketch.recipes.tables.models.hessians import (
    FlatHessian,
    relative_error,
)

_STEPS_AN_EIGENVALUE = 4
_SKETCH_BITS = 14


def ours(model: nn.Module, batches: Any, count: int, steps: int) -> Tensor:
    """By Lanczos in a sketch, without the shift."""
    hessian = HessianOperator(model, batches, self_check=False)
    sketch = ModelSketch.from_model(model, 2**_SKETCH_BITS, operator="affd")
    operator = SketchedHessian(hessian, sketch)
    spectrum = hessian_spectrum(operator, steps, keep_vectors=count, progress=False)
    return spectrum.eigenvalues.flip(0)[:count]


def ours_unsketched(model: nn.Module, batches: Any, count: int, steps: int) -> Tensor:
    """By Lanczos on vectors of the model's size."""
    hessian = HessianOperator(model, batches, self_check=False)
    found = lanczos(FlatHessian(hessian), steps, progress=False)
    return found.eigenvalues.flip(0)[:count]


def hessian_eigenthings(
    model: nn.Module, batches: Any, count: int, steps: int
) -> Tensor:
    """By its Lanczos method, which keeps vectors of the model's size."""
    package = importlib.import_module("hessian_eigenthings")
    operator = package.HessianOperator(model, list(batches), package.hf_lm_loss())
    found = package.lanczos(operator, k=count, max_iter=steps, which="LA", seed=0)
    return found.eigenvalues.double().sort(descending=True).values[:count]


def curvlinops(model: nn.Module, batches: Any, count: int, steps: int) -> Tensor:
    """Compute them by ARPACK, with one numpy vector per Lanczos step."""
    package = importlib.import_module("curvlinops")
    linalg = importlib.import_module("scipy.sparse.linalg")
    data = [
        (UserDict({k: v for k, v in batch.items() if k != "labels"}), batch["labels"])
        for batch in batches
    ]

    operator = package.HessianLinearOperator(
        _Logits(model),
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        data,
        check_deterministic=False,
        batch_size_fn=lambda inputs: len(inputs["input_ids"]),
    ).to_scipy()
    found = linalg.eigsh(
        operator, k=count, which="LA", ncv=steps, return_eigenvectors=False
    )
    return torch.from_numpy(found).double().sort(descending=True).values


class _Logits(nn.Module):
    """A model as a function from its inputs to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        """The logits."""
        return self.model(**inputs).logits


RUNS: Mapping[str, Callable[..., Tensor]] = {
    "hf_sketch, sketched": ours,
    "hf_sketch, no sketch": ours_unsketched,
    "hessian_eigenthings": hessian_eigenthings,
    "curvlinops": curvlinops,
}


def compare_eigenvalues(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    count: int,
    exact_steps: int,
    peers: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Seconds an eigenvalue, extra peak of torch's memory, and error, of each run.

    All take the same number of Lanczos steps, but for ARPACK, which goes on until it
    has converged. The yardstick is Lanczos of more steps.

    Args:
        model: a classifier; its attention is made eager, as one peer has no other way.
        batches: one batch: peers weight several by batches, not by examples.
        count: number of the eigenvalues.
        exact_steps: Lanczos steps of the yardstick.
        peers: names of those that are installed.
    """
    model.set_attn_implementation("eager")
    steps = _STEPS_AN_EIGENVALUE * count
    exact = ours_unsketched(model, batches, count, exact_steps)
    results: dict[str, dict[str, Any]] = {}
    for name, run in RUNS.items():
        if not (name.startswith("hf_sketch") or name in peers):
            continue
        result = _measured(partial(run, model, batches, count, steps), exact)
        results[name] = result
        print(
            f"  {name:22s} {result['seconds_an_eigenvalue']:.3f} s an eigenvalue, peak "
            f"{result['extra_peak_bytes'] / 2**20:.0f} MiB, relative error "
            f"{result['relative_error']:.2g}"
        )
    return results


def _measured(run: Callable[[], Tensor], exact: Tensor) -> dict[str, Any]:
    """One run; its memory is watched meanwhile."""
    found: list[Tensor] = []
    start = time.perf_counter()
    peak = peak_extra_bytes(lambda: found.append(run()))
    seconds = time.perf_counter() - start
    return {
        "eigenvalues": found[0].tolist(),
        "seconds_an_eigenvalue": seconds / len(exact),
        "extra_peak_bytes": peak,
        "relative_error": relative_error(found[0], exact),
    }
