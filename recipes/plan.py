"""The command `hf-sketch plan`."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from hf_sketch.planning.limits import limits_of
from hf_sketch.planning.plan import Plan, plan_recording
from hf_sketch.planning.rate import measured_rate
from hf_sketch.planning.settings import RowSettings, SpectrumSettings, TrainingRun
from hf_sketch.planning.units import as_bytes, as_seconds
from hf_sketch.recipes.meta_models import load_config, meta_model
from hf_sketch.recipes.options.plan import PlanArguments


def run_plan(arguments: PlanArguments) -> Plan:
    """Plan, print and, if asked, save.

    Raises:
        OSError: there is no such config.
        ValueError: an argument is bad, or does not fit the model.
    """
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    model = meta_model(load_config(arguments.model), dtype)
    run, rows = _filled(TrainingRun, arguments), _filled(RowSettings, arguments)
    rate = measured_rate(rows) if arguments.measure else arguments.numbers_per_second
    spectrum = SpectrumSettings(arguments.spectrum_out_size, arguments.krylov_dim)
    plan = plan_recording(
        model, run, rows, spectrum, rate, arguments.plain_step_seconds
    )
    limits = limits_of(plan, run, arguments.memory_bytes, dtype.itemsize)
    lines = [f"{name:34s} {value}" for name, value in table_of(plan, rate).items()]
    if limits:
        lines += ["where it breaks:", *(f"- {limit}" for limit in limits)]
    if arguments.output_file is not None:
        content = {
            "arguments": vars(arguments),
            "numbers_per_second": rate,
            "plan": asdict(plan),
            "limits": limits,
        }
        Path(arguments.output_file).write_text(json.dumps(content, indent=1))
        lines.append(f"saved {arguments.output_file}")
    print("\n".join(lines))
    return plan


def table_of(plan: Plan, rate: float | None = None) -> dict[str, str]:
    """Return all figures as text; those that are estimates begin with ~."""
    store, spectrum = plan.store, plan.spectrum
    table = {
        "elements that train": f"{plan.elements:,}",
        "steps recorded": f"{plan.steps:,}",
        "bytes per row": f"{store.row_bytes:,.0f}",
        "rows": f"{store.rows:,} of examples, {store.step_rows:,} of steps",
        "store": f"{as_bytes(store.total_bytes)} in {store.files:,} files",
        "numbers sketched per step": f"{plan.step_numbers:,} per rank",
        "device memory, at training's peak": f"~{as_bytes(plan.held_bytes)} per rank",
        "device memory, first step": f"{as_bytes(plan.first_step_bytes)} on rank 0",
        "host memory": f"{as_bytes(plan.host_bytes)} per rank",
        "network, per recorded step": f"{as_bytes(plan.recording_network_bytes)} per "
        f"rank, beside {as_bytes(plan.training_network_bytes)} of gradients",
        "Hessian-vector products": f"{spectrum.products} per spectrum",
        "Hessian-vector memory": f"{as_bytes(spectrum.vector_bytes)} and activations",
        "Lanczos basis": as_bytes(spectrum.basis_bytes),
    }
    if plan.step_seconds is not None:
        table["numbers sketched per second"] = f"{rate:,.4g}"
        table["rows of a recorded step"] = f"~{as_seconds(plan.step_seconds)}"
        whole = as_seconds(plan.steps * plan.step_seconds)
        table["rows of the whole run"] = f"~{whole}"
    if plan.slowdown is not None:
        table["time of a step, on average"] = f"~{plan.slowdown:.3f} times a plain one"
    return table


def _filled(kind: type[Any], arguments: PlanArguments) -> Any:
    """Return settings filled with the arguments of the same names."""
    given: dict[str, Any] = vars(arguments)
    return kind(**{f.name: given[f.name] for f in fields(kind)})
