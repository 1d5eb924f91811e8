"""Options of `hf-sketch plan`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PlanArguments:
    """Compute what recording a training run will cost, from the model's config alone.

    Nothing is trained and no weight is loaded. Rows, files, bytes, Lanczos memory and
    network traffic are exact. Device memory is an estimate, and so are seconds, which
    come from one measured rate: see docs/planning.md.
    """

    model: str = field(
        metadata={"help": "A config.json, its folder, or the name of a Hub model."}
    )
    examples: int = field(metadata={"help": "Examples in the training set."})
    epochs: int = field(default=1, metadata={"help": "Training epochs."})
    tokens: int = field(default=1024, metadata={"help": "Tokens per example."})
    batch_size: int = field(
        default=8, metadata={"help": "Examples per batch and device."}
    )
    accumulation: int = field(
        default=1, metadata={"help": "Batches per optimizer step."}
    )
    ranks: int = field(default=1, metadata={"help": "Devices that train together."})
    sharded: bool = field(
        default=False, metadata={"help": "Shard the model over the devices (FSDP2)."}
    )
    save_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between checkpoints; each checkpoint also closes the current"
            " sketch file."
        },
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Dtype that the model computes in."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    layout: str = field(default="grouped", metadata={"help": "grouped or blocked."})
    operator: str = field(
        default="srht",
        metadata={"help": "Operator of the parameters that are not grouped."},
    )
    groups: int = field(
        default=1,
        metadata={"help": "Groups of layers, each with `out_size` numbers of its own."},
    )
    row_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of rows on disk: float32, float16 or int8."},
    )
    every_steps: int = field(
        default=1, metadata={"help": "Record every `every_steps`-th step."}
    )
    per_step: bool = field(
        default=True, metadata={"help": "Whether one row per step is recorded as well."}
    )
    spectrum_out_size: int = field(
        default=2**14, metadata={"help": "Numbers per sketch of the Hessian."}
    )
    krylov_dim: int = field(
        default=100, metadata={"help": "Lanczos steps per spectrum."}
    )
    measure: bool = field(
        default=False,
        metadata={
            "help": "Measure how fast this machine sketches; takes a few seconds."
        },
    )
    numbers_per_second: float | None = field(
        default=None,
        metadata={
            "help": "Rate at which a device sketches, as --measure prints it on the "
            "machine that will train. Without a rate no seconds are estimated."
        },
    )
    plain_step_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Measured seconds of a training step without rows, to estimate how "
            "much slower training gets."
        },
    )
    memory_bytes: float = field(
        default=8e10, metadata={"help": "Memory of one device, in bytes."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file to save all figures to."}
    )
