"""The sections of the run: what each measures, and how long it may take."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Dense, ModelSketch, Sketch
from hf_sketch.model.sketch import LAYOUTS
from hf_sketch.recipes.placement import device
from hf_sketch.recipes.tables.costs.hvp_cost import HvpCostArguments, measure_products
from hf_sketch.recipes.tables.costs.per_example_cost import (
    PLAIN,
    PerExampleCostArguments,
    alternate,
    run_per_example_cost,
    runs_of,
)
from hf_sketch.recipes.tables.costs.subspace_cost import (
    SubspaceCostArguments,
    run_subspace_cost,
)
from hf_sketch.recipes.tables.gpu.floors import ceilings, scoring, step_rows
from hf_sketch.recipes.tables.gpu.fused_head import leave_out_logits
from hf_sketch.recipes.tables.gpu.limits import Section
from hf_sketch.recipes.tables.measure import spread
from hf_sketch.recipes.tables.paper.figures_3_4 import (
    Figures34Arguments,
    run_figures_3_4,
)
from hf_sketch.recipes.tables.paper.table8 import Table8Arguments, run_table8
from hf_sketch.recipes.tables.paper.table11 import Table11Arguments, run_table11
from hf_sketch.recipes.tables.peers import PEERS
from hf_sketch.recipes.tables.quality.recorded_runs import SHAPES, Setting

_ROOT = Path(__file__).parents[3]
_TESTS = ("tests/devices", "tests/sketches")  # that have any for a device


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all sections share.

    Args:
        output_dir: where each saves a table of its own.
        rounds: rounds of each measurement.
        tiny: small sizes, as a check.
        found: results of the sections before.
    """

    output_dir: str
    rounds: int
    tiny: bool
    found: Mapping[str, Any]

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments of the tables' own scripts."""
        names = "output_dir", "rounds", "tiny"
        return {name: getattr(self, name) for name in names}

    @property
    def rates(self) -> dict[str, float]:
        """The ceilings, measured by a section before, or now."""
        known = self.found.get("ceilings", {}).get("results")
        return known or ceilings(self.rounds, self.tiny)


def sections_of(of: Settings) -> dict[str, Section]:
    """What can be run, by name; in turn it takes eight minutes at most."""
    return {
        "ceilings": Section(10, partial(ceilings, of.rounds, of.tiny)),
        "agreement": Section(30, partial(agreement, of.tiny)),
        "layouts": Section(15, layouts_agreement),
        "step": Section(35, partial(_step, of, "gpt2-small", torch.float32)),
        "step_1b": Section(35, partial(_step, of, "llama-1b", torch.bfloat16)),
        "examples": Section(50, partial(_examples, of, "gpt2-small-1024")),
        "examples_1b": Section(50, partial(_examples, of, "llama-1b")),
        "fused_head": Section(20, partial(_examples, of, "gpt2-small-1024", True)),
        "fused_head_1b": Section(20, partial(_examples, of, "llama-1b", True)),
        "rows_and_peers": Section(35, partial(_peers, of)),
        "hessian": Section(25, partial(_hessian, of)),
        "subspace": Section(20, partial(_subspace, of)),
        "scoring": Section(30, partial(_scoring, of)),
        "tables_3_4_8": Section(20, partial(_table8, of)),
        "table_11": Section(20, partial(_table11, of)),
        "figures_3_4": Section(15, partial(_figures, of)),
        "tests": Section(50, device_tests),
    }


def operators(in_size: int, out_size: int) -> list[Sketch]:
    """One of each operator and mix."""
    sizes = (in_size, out_size, 0)
    mixed = [
        kind(*sizes, mix=mix)
        for kind in (FJL, AFFD, AFJL)
        for mix in ("hadamard", "fft", "kronecker")
    ]
    blocked = [kind(*sizes, block_size=2**12) for kind in (SRHT, AFFD, AFJL)]
    dense = Dense(2**12, 2**6, 0)
    return [*mixed, *blocked, SRHT(*sizes), FFD(*sizes), QK(*sizes), dense]


def agreement(tiny: bool) -> dict[str, dict[str, float]]:
    """Distances of sketches and adjoints from the CPU's, relative to their norms."""
    in_size, out_size = (2**12, 2**8) if tiny else (2**20, 2**12)
    distances: dict[str, dict[str, float]] = {}
    for operator in operators(in_size, out_size):
        x, y = torch.randn(operator.in_size), torch.randn(operator.out_size)
        pairs = {
            "sketch": (operator @ x.to(device()), operator @ x),
            "adjoint": (operator.T @ y.to(device()), operator.T @ y),
        }
        distances[repr(operator)] = {
            name: _distance(got, expected) for name, (got, expected) in pairs.items()
        }
    return distances


def layouts_agreement() -> dict[str, dict[str, float]]:
    """The same of whole gradients, in every layout and by operators with kernels."""
    shapes = (("table", (300, 64)), ("weight", (300, 260)), ("bias", (260,)))
    gradients = {name: torch.randn(shape) for name, shape in shapes}
    away = {name: x.to(device()) for name, x in gradients.items()}
    sketches = {layout: ModelSketch(shapes, 256, layout) for layout in LAYOUTS}
    for operator in ("affd", "afjl", "fjl"):
        sketch = ModelSketch(shapes, 256, "grouped", operator=operator)
        sketches[f"grouped {operator}"] = sketch
    vector = torch.randn(256)
    return {
        name: {
            "sketch": _distance(sketch.sketch(away), sketch.sketch(gradients)),
            "adjoint": _distance(
                _end_to_end(sketch.adjoint(vector.to(device()))),
                _end_to_end(sketch.adjoint(vector)),
            ),
        }
        for name, sketch in sketches.items()
    }


def _end_to_end(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors.values()])


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu() - expected).norm() / expected.norm())


def _step(of: Settings, shape: str, dtype: torch.dtype) -> dict[str, Any]:
    bandwidth = of.rates["copy_bytes_per_second"]
    bits = (8,) if of.tiny else (10, 12, 14, 16, 18)
    return step_rows(shape, dtype, bits, bandwidth, of.tiny)


def _examples(of: Settings, name: str, fused: bool = False) -> dict[str, Any]:
    """Steps of training with rows of examples, in turn with plain ones.

    The ratio to plain training takes the place of that to a floor. With a fused head,
    neither keeps logits.
    """
    shape = SHAPES[name].tiny if of.tiny else SHAPES[name]
    arguments = PerExampleCostArguments(runs="grouped")
    setting = Setting.of_shape(shape, batches=4)
    if fused:
        leave_out_logits(setting.model)
    makers, _ = runs_of(arguments, setting)
    rounds = 1 if of.tiny else 2
    seconds = alternate(setting, makers, rounds, steps=4 if of.tiny else 8)
    plain = spread(seconds[PLAIN])["median_seconds"]
    return {
        name: {
            **spread(times),
            "ratio_to_plain": spread(times)["median_seconds"] / plain,
        }
        for name, times in seconds.items()
    }


def _peers(of: Settings) -> Any:
    runs = ",".join(("grouped", *(n for n, peer in PEERS.items() if peer.version)))
    return run_per_example_cost(PerExampleCostArguments(runs=runs, **of.shared))


def _hessian(of: Settings) -> Any:
    sizes = {"examples": 2, "tokens": 16, "bits": 8}
    if not of.tiny:
        sizes = {"examples": 8, "tokens": 128, "bits": 14}
    return measure_products(HvpCostArguments(**sizes, **of.shared))


def _subspace(of: Settings) -> Any:
    return run_subspace_cost(SubspaceCostArguments(operators="affd,srht", **of.shared))


def _scoring(of: Settings) -> Any:
    rows, out_size = (2**12, 64) if of.tiny else (10**6, 4096)
    return scoring(rows, out_size, of.rates)


def _table8(of: Settings) -> Any:
    return run_table8(Table8Arguments(elements=2**24, bits=12, **of.shared))


def _table11(of: Settings) -> Any:
    longest = {"elements": 0, "longest_seconds": 1}
    return run_table11(Table11Arguments(**longest, **of.shared))


def _figures(of: Settings) -> Any:
    return run_figures_3_4(Figures34Arguments(**of.shared))


def device_tests() -> dict[str, Any]:
    """What the tests that need a device say, where the tests are at hand."""
    if not (_ROOT / "tests" / "devices").is_dir():
        return {"left_out": "the tests are not installed"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-q", *_TESTS]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "last": lines[-1:], "failed": failed}
