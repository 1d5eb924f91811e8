"""Options of `hf-sketch plan`."""

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")


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
        default=6e14,
        metadata={"help": "That large products reach in training, on one device."},
    )
    float32_flops_per_second: float = field(
        default=5e13,
        metadata={"help": "The same in float32, as the sketch takes them."},
    )
    bytes_per_second: float = field(
        default=2e12,
        metadata={"help": "That elementwise operations read and write."},
    )
    seconds_per_call: float = field(
        default=2e-4,
        metadata={"help": "Of Python and kernel launches, to sketch a module's call."},
    )
    disk_bytes_per_second: float = field(
        default=7e8,
        metadata={"help": "At which one process reads the store."},
    )
    memory_bytes: float = field(default=8e10, metadata={"help": "Of one device."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON of all figures, beside the table."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}.")
