"""The command `hf-sketch plan`."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_sketch.planning.limits import limits_of
from hf_sketch.planning.machine import Machine
from hf_sketch.planning.plan import Plan, plan_recording
from hf_sketch.planning.settings import RowSettings, SpectrumSettings, TrainingRun

# The folder is mapped into the package when it is installed, which pyright cannot see.
from hf_sketch.recipes.meta_models import (  # pyright: ignore[reportMissingImports]
    load_config,
    meta_model,
)
from hf_sketch.recipes.options.plan import PlanArguments

Settings = TypeVar("Settings", TrainingRun, RowSettings, Machine)


def run_plan(arguments: PlanArguments) -> Plan:
    """Plan, print and, if asked, save.

    Raises:
        OSError: there is no such config.
        ValueError: an argument is bad, or does not fit the model.
    """
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    model = meta_model(load_config(arguments.model), dtype)
    run, rows = _filled(TrainingRun, arguments), _filled(RowSettings, arguments)
    machine = Machine.measured() if arguments.measure else _filled(Machine, arguments)
    spectrum = SpectrumSettings(
        arguments.spectrum_out_size, arguments.krylov_dim, arguments.spectrum_batches
    )
    plan = plan_recording(model, run, rows, spectrum, machine, arguments.step_seconds)
    limits = limits_of(plan, run, machine, dtype.itemsize)
    lines = [f"{name:34s} {value}" for name, value in table_of(plan).items()]
    lines += ["where it breaks:", *(f"- {limit}" for limit in limits)]
    if arguments.output_file is not None:
        content = {
            "arguments": vars(arguments),
            "machine": asdict(machine),
            "plan": asdict(plan),
            "limits": limits,
        }
        Path(arguments.output_file).write_text(json.dumps(content, indent=1))
        lines.append(f"saved {arguments.output_file}")
    print("\n".join(lines))
    return plan


def table_of(plan: Plan) -> dict[str, str]:
    """All figures as text; those that are estimates begin with ~."""
    store, times, memory = plan.store, plan.times, plan.memory
    spectrum = plan.spectrum
    lost = times.rows_per_second_lost
    return {
        "elements that train": f"{plan.elements:,}",
        "steps recorded": f"{plan.steps:,}",
        "bytes a row": f"{store.row_bytes:,.0f}",
        "rows": f"{store.rows:,} of examples, {store.step_rows:,} of steps",
        "store": f"{as_bytes(store.total_bytes)} in {store.files:,} files",
        "one pass over it": f"~{as_seconds(plan.reading_seconds)} of one process",
        "a plain step": f"~{as_seconds(times.step_seconds)}",
        "rows of a step": f"~{as_seconds(times.sketch_seconds)}, "
        f"{times.slowdown:.3f} times a plain step on the mean",
        "rows per second": f"~{times.plain_rows_per_second:,.4g} without, "
        f"~{lost:,.3g} lost",
        "lost in the whole run": f"~{as_seconds(plan.steps * times.sketch_seconds)}",
        "device memory, at training's peak": f"~{as_bytes(memory.held_bytes)} a rank",
        "device memory, at other times": f"~{as_bytes(memory.working_bytes)} a rank",
        "device memory, first step": f"{as_bytes(memory.first_step_bytes)} on rank 0",
        "host memory": f"{as_bytes(memory.host_bytes)} a rank",
        "network, a recorded step": f"{as_bytes(plan.network.recording_bytes)} a rank, "
        f"beside {as_bytes(plan.network.training_bytes)} of gradients",
        "Hessian-vector products": f"{spectrum.products} a spectrum, each "
        f"~{as_seconds(spectrum.product_seconds)}",
        "Hessian-vector memory": f"{as_bytes(spectrum.vector_bytes)} and activations",
        "Lanczos basis": as_bytes(spectrum.basis_bytes),
    }


def as_bytes(count: float) -> str:
    """A size in the unit that suits it, powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} PB"


def as_seconds(count: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("ms", 1e-3), ("s", 1.0), ("minutes", 60.0), ("hours", 3600.0)):
        limit = {"ms": 1.0, "s": 120.0, "minutes": 7200.0, "hours": 172800.0}[unit]
        if count < limit:
            return f"{count / size:.3g} {unit}"
    return f"{count / 86400:,.3g} days"


def _filled(kind: type[Settings], arguments: PlanArguments) -> Settings:
    """Settings with those of the arguments that have their names."""
    given: dict[str, Any] = vars(arguments)
    return kind(**{f.name: given[f.name] for f in fields(kind)})
