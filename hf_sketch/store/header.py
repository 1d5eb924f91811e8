"""Sketches on disk: a header, a manifest for each process, Arrow shards.

docs/format.md is the format.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from hf_sketch.durable import read_sealed, sync_directory, write_sealed
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.shards import Shard

FORMAT_VERSION: Final = 1
HEADER: Final = "header.json"
_CHECK_TOLERANCE = 1e-4
_UNITS = (
    "a row is the gradient of the example's own loss; the sum of weight * row over a "
    "step's examples is the step's gradient before clipping"
)


@dataclass(frozen=True)
class Header:
    """What the store's header says of its rows.

    Args:
        model_sketch: the map that made them.
        loss: an example's own loss: the "mean" or the "sum" over its tokens.
        row_dtype: what sketches are kept in; see `hf_sketch.store.rows.encode`.
        measured_error: of their inner products, if it was measured.
        step_examples: how many an optimizer step takes, of all processes together;
            None if it is not known.
    """

    model_sketch: ModelSketch
    loss: str = "mean"
    row_dtype: str = "float32"
    measured_error: MeasuredError | None = None
    step_examples: int | None = None

    @property
    def settings(self) -> str:
        """What must be equal for rows to be added, on one line."""
        sketch = self.model_sketch
        return (
            f"out_size={sketch.out_size}, layout={sketch.layout!r}, "
            f"operator={sketch.operator!r}, seed={sketch.seed}, loss={self.loss!r}, "
            f"row_dtype={self.row_dtype!r}, {len(sketch.shapes)} parameters, "
            f"{sketch.in_size} elements"
        )


@dataclass(frozen=True)
class Gap:
    """Steps whose rows are not there.

    Args:
        first_step: the first of them.
        reason: why.
        last_step: the last of them; None if recording was off until training was
            resumed.
    """

    first_step: int
    reason: str
    last_step: int | None = None

    def __str__(self) -> str:
        steps = f"of steps {self.first_step} to {self.last_step}"
        if self.last_step is None:
            steps = f"from step {self.first_step} on until training was resumed"
        return f"{steps}: {self.reason}"


@dataclass(frozen=True)
class Manifest:
    """What one process has written.

    Args:
        rank: of the process.
        world_size: how many there were.
        shards: in the order in which they were written.
        gaps: where recording was off.
    """

    rank: int = 0
    world_size: int = 1
    shards: tuple[Shard, ...] = ()
    gaps: tuple[Gap, ...] = ()

    @property
    def file(self) -> str:
        """Its name within the store's directory."""
        return f"manifest-{self.rank:05d}.json"

    @property
    def last_step(self) -> int:
        """The greatest step of which there is a row; 0 for none."""
        return max((shard.last_step for shard in self.shards), default=0)


def create_store(directory: Path, header: Header, rank: int = 0) -> None:
    """Write the header and a process's empty manifest: both are there, or neither.

    Raises:
        OSError: the directory cannot be written.
    """
    try:
        if directory.is_dir() and any(directory.iterdir()):
            write_manifest(directory, Manifest(rank))
            write_header(directory, header)
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        made = directory.with_name(directory.name + ".tmp")
        made.mkdir(exist_ok=True)
        write_manifest(made, Manifest(rank))
        write_header(made, header)
        made.replace(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the sketches cannot be written to {directory} ({error.strerror}): "
            "give the Trainer an output_dir that can be written",
        ) from error


def write_header(directory: Path, header: Header) -> None:
    """Replace the header in one step."""
    content = {
        "format_version": FORMAT_VERSION,
        "model_sketch": header.model_sketch.to_dict(),
        "units": _UNITS,
        "loss": header.loss,
        "row_dtype": header.row_dtype,
        "measured_error": header.measured_error and asdict(header.measured_error),
        "step_examples": header.step_examples,
        "check_value": header.model_sketch.check_value(),
    }
    write_sealed(directory / HEADER, content)


def read_header(directory: Path) -> Header:
    """The store's header, its map checked against its probe.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the header was changed, has another version, or describes a map
            that this installation computes differently.
    """
    path = directory / HEADER
    if not path.is_file():
        raise FileNotFoundError(
            f"no sketches at {directory}: give the Trainer's output_dir, or its "
            "'sketches' directory, of a run with GradientSketchCallback."
        )
    content = read_sealed(path, _mend(path))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got "
            f"{content.get('format_version')!r}: open it with the hf_sketch that wrote "
            "it."
        )
    model_sketch = ModelSketch.from_dict(content["model_sketch"])
    _check_value(path, model_sketch, content["check_value"])
    error: dict[str, Any] | None = content["measured_error"]
    return Header(
        model_sketch,
        content["loss"],
        content["row_dtype"],
        None if error is None else MeasuredError(**error),
        content.get("step_examples"),
    )


def write_measured_error(directory: Path, error: MeasuredError) -> None:
    """Put the rows' measured error into the header, in one step."""
    write_header(directory, replace(read_header(directory), measured_error=error))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a process's manifest in one step: readers see the old or the new one."""
    write_sealed(directory / manifest.file, asdict(manifest))


def read_manifests(directory: Path) -> list[Manifest]:
    """The manifests of all processes that have one, by rank.

    Raises:
        ValueError: one was changed.
    """
    return [read_manifest(path) for path in sorted(directory.glob("manifest-*.json"))]


def read_manifest(path: Path) -> Manifest:
    """One process's manifest.

    Raises:
        ValueError: it was changed.
    """
    content = read_sealed(path, _mend(path))
    shards = tuple(Shard(**shard) for shard in content["shards"])
    gaps = tuple(Gap(**gap) for gap in content["gaps"])
    return Manifest(content["rank"], content["world_size"], shards, gaps)


def missing_ranks(manifests: Sequence[Manifest]) -> list[int]:
    """The processes that took part and left no manifest."""
    there = {manifest.rank for manifest in manifests}
    count = max((manifest.world_size for manifest in manifests), default=1)
    return [rank for rank in range(count) if rank not in there]


def shards_of(manifests: Sequence[Manifest], kind: str) -> list[Shard]:
    """All shards of a kind, by step, then by rank."""
    placed = [
        (shard.first_step, manifest.rank, place, shard)
        for manifest in manifests
        for place, shard in enumerate(manifest.shards)
        if shard.kind == kind
    ]
    return [shard for *_, shard in sorted(placed, key=lambda entry: entry[:3])]


def _check_value(path: Path, model_sketch: ModelSketch, check_value: Any) -> None:
    """Raise unless this installation computes the map that made the rows."""
    ours, theirs = torch.tensor(model_sketch.check_value()), torch.tensor(check_value)
    if not torch.allclose(ours, theirs, rtol=_CHECK_TOLERANCE, atol=_CHECK_TOLERANCE):
        raise ValueError(
            f"the check value in {path} starts with {check_value[0]:.6g}, this "
            f"installation computes {float(ours[0]):.6g}: open the store with the "
            "hf_sketch that wrote it."
        )


def _mend(path: Path) -> str:
    return f"restore it, or run hf-sketch repair {path.parent}"
