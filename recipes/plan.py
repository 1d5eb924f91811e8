"""The command `hf-sketch plan`."""

import json
from dataclasses import asdict, dataclass, field, fields
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

DTYPES = ("float32", "bfloat16", "float16")
Settings = TypeVar("Settings", TrainingRun, RowSettings, Machine)


@dataclass
class PlanArguments:
    """Tell what recording a training run will cost, from the model's config alone.

    Nothing is trained and no weight is loaded. Sizes of files, Lanczos memory, counts
    and network bytes are exact; seconds and device memory are estimates, as good as the
    rates of the machine that are given: see docs/planning.md.
    """

    model: str = field(
        metadata={"help": "A config.json, the folder of one, or a name on the Hub."}
    )
    examples: int = field(metadata={"help": "Examples of the training set."})
    epochs: int = field(default=1, metadata={"help": "Passes over them."})
    tokens: int = field(default=1024, metadata={"help": "Of an example."})
    batch_size: int = field(default=8, metadata={"help": "Examples, of each rank."})
    accumulation: int = field(default=1, metadata={"help": "Batches in a step."})
    ranks: int = field(default=1, metadata={"help": "Devices that train together."})
    sharded: bool = field(
        default=False, metadata={"help": "Each holds a part of the model (FSDP2)."}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints, which end files."}
    )
    dtype: str = field(
        default="bfloat16",
        metadata={"help": f"What the model computes in: one of {', '.join(DTYPES)}."},
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row."})
    layout: str = field(default="factored", metadata={"help": "factored or blocked."})
    operator: str = field(
        default="srht", metadata={"help": "Of the parameters that are not factored."}
    )
    row_dtype: str = field(
        default="float32", metadata={"help": "float32, float16 or int8, on disk."}
    )
    every_steps: int = field(
        default=1, metadata={"help": "Record one step of so many."}
    )
    per_step: bool = field(
        default=True, metadata={"help": "Record a row for each step, too."}
    )
    spectrum_out_size: int = field(
        default=2**14, metadata={"help": "Numbers in a sketch of the Hessian."}
    )
    krylov_dim: int = field(default=100, metadata={"help": "Lanczos steps."})
    spectrum_batches: int = field(
        default=4, metadata={"help": "Batches of the Hessian's loss."}
    )
    step_seconds: float | None = field(
        default=None,
        metadata={"help": "Of a plain step, if you have measured it: no estimate."},
    )
    measure: bool = field(
        default=False,
        metadata={"help": "Take the rates of this machine's processor instead."},
    )
    flops_per_second: float = field(
        default=Machine.flops_per_second,
        metadata={"help": "That large products reach in training, on one device."},
    )
    float32_flops_per_second: float = field(
        default=Machine.float32_flops_per_second,
        metadata={"help": "The same in float32, as the sketch takes them."},
    )
    bytes_per_second: float = field(
        default=Machine.bytes_per_second,
        metadata={"help": "That elementwise operations read and write."},
    )
    seconds_per_call: float = field(
        default=Machine.seconds_per_call,
        metadata={"help": "Of Python and kernel launches, to sketch a module's call."},
    )
    disk_bytes_per_second: float = field(
        default=Machine.disk_bytes_per_second,
        metadata={"help": "At which one process reads the store."},
    )
    memory_bytes: float = field(
        default=Machine.memory_bytes, metadata={"help": "Of one device."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON of all figures, beside the table."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}.")


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
