"""Options of the commands that take recorded directories."""

from dataclasses import dataclass, field


@dataclass
class InfoArguments:
    """Describe a store."""


@dataclass
class VerifyArguments:
    """Compare every byte of a store with its checksums; exit with 1 on a difference.

    With --from and --to, also check that nothing but the recorded steps lies between
    two checkpoints of one run with GradientSketchCallback(updates=True).
    """

    from_checkpoint: str | None = field(
        default=None,
        metadata={
            "aliases": ["--from"],
            "help": "Folder of the earlier checkpoint, of a model or an adapter.",
        },
    )
    to_checkpoint: str | None = field(
        default=None,
        metadata={"aliases": ["--to"], "help": "Folder of the later checkpoint."},
    )


@dataclass
class RepairArguments:
    """Set damaged files of a store aside, so that it opens again."""


@dataclass
class UpgradeArguments:
    """Bring stores of an earlier version of the format to the newest one, in place."""


@dataclass
class CompactArguments:
    """Join small files of stores into files of about 0.9 GiB, in place."""


@dataclass
class MergeArguments:
    """Merge stores with the same map, as from several machines, into one."""

    output_dir: str = field(
        metadata={"help": "Folder of the new store; must not exist."}
    )


@dataclass
class ExportArguments:
    """Copy the rows of a store to files of another format."""

    to: str = field(metadata={"help": "Format: parquet, lance, npy or safetensors."})
    output_dir: str = field(metadata={"help": "New folder for the files."})


@dataclass
class UploadArguments:
    """Upload a store to a URL, sending only what is new, also while a run writes it."""

    url: str = field(
        metadata={"help": "Directory for the store, such as s3://bucket/run/sketches."}
    )


@dataclass
class SpectrumArguments:
    """Print the Hessian spectra that a run recorded, and optionally plot them."""

    plot: str | None = field(
        default=None,
        metadata={
            "help": "File (.svg, .png or .pdf) to plot RNEG and R(n) to, as in Figure 2"
            " of the paper."
        },
    )


@dataclass
class ReportArguments:
    """Write everything that a run recorded to one HTML page that opens offline.

    It shows the sketches, the answers of hf-sketch attribute, spectra and the search
    for the intrinsic dimension, each if present.
    """

    output_file: str | None = field(
        default=None, metadata={"help": "HTML file; DIR/report.html by default."}
    )
