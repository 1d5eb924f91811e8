"""What a run does with the store that it finds: decided once, then done."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

from hf_sketch.durable import set_aside, sync_directory
from hf_sketch.store.header import HEADER, Header, read_header, write_header
from hf_sketch.store.manifest import Manifest, read_manifests, write_manifest
from hf_sketch.store.shards import read_shard, write_shard


@dataclass(frozen=True)
class Opening:
    """What a run does with the store that it finds.

    Args:
        action: "new": write a header, there are no rows. "resume": add rows to those of
            the steps before. "set_aside": rename the store, and start a new one.
            "refuse": raise an error.
        header: what the header says from now on.
        reason: why the store is refused or set aside.
    """

    action: Literal["new", "resume", "set_aside", "refuse"]
    header: Header
    reason: str = ""


def decide_opening(
    ours: Header,
    theirs: Header | None,
    manifests: Sequence[Manifest],
    resume_step: int,
    rank: int = 0,
) -> Opening:
    """Decide what to do with a store.

    Args:
        ours: header of the rows that will be written.
        theirs: header of the store; None if there is none that can be read.
        manifests: those of the store.
        resume_step: the optimizer step that training resumes after; 0 for a new run.
        rank: rank of this process. Rank 0 comes first, so for the others, rows of other
            ranks may already be those of this run.
    """
    old = [manifest for manifest in manifests if rank in (0, manifest.rank)]
    last_step = max((manifest.last_step for manifest in old), default=0)
    if theirs is None:
        if last_step:
            return Opening("set_aside", ours, "it holds rows and no header")
        return Opening("new", ours)
    if resume_step and (reason := _step_problem(ours, theirs, manifests)):
        return Opening("refuse", ours, reason)
    recorded = any(manifest.shards or manifest.gaps for manifest in manifests)
    if not (recorded if resume_step else last_step):
        return Opening("new", ours)
    # Rows of a store from before a release had these columns go on without them.
    if not theirs.fits(replace(ours, answers=theirs.answers)):
        return Opening("refuse", ours, _settings_problem(ours, theirs))
    if not resume_step:
        reason = f"it holds rows up to step {last_step} of a run that is not resumed"
        return Opening("set_aside", ours, reason)
    step_examples = ours.step_examples or theirs.step_examples
    theirs = replace(theirs, step_examples=step_examples, processes=ours.processes)
    return Opening("resume", replace(theirs, train_rows=ours.train_rows))


def _settings_problem(ours: Header, theirs: Header) -> str:
    return (
        f"its rows were made with {theirs.settings}, this run uses {ours.settings}. "
        "Pass the store's settings, or another output_dir."
    )


def _step_problem(
    ours: Header, theirs: Header, manifests: Sequence[Manifest]
) -> str | None:
    """Return how the Trainer would skip other examples than were trained, if it would.

    With the same number of processes, the Trainer itself warns of other batches.
    """
    most = max((manifest.world_size for manifest in manifests), default=None)
    before = theirs.processes or most or ours.processes
    known = theirs.step_examples
    if before == ours.processes or known in (None, ours.step_examples):
        return None
    return (
        f"it was recorded by {before} processes with {known} examples per optimizer "
        f"step, this run has {ours.processes} with {ours.step_examples}, so the Trainer"
        f" would skip the wrong examples. Resume with {before} processes, or set "
        "per_device_train_batch_size and gradient_accumulation_steps so that a step "
        f"takes {known} examples."
    )


def open_store(
    directory: Path, ours: Header, resume_step: int, rank: int, world_size: int
) -> tuple[Header, Manifest]:
    """Make a store ready for one process's rows.

    A process drops later rows of its own, and of ranks that take part no longer, but
    never those of another process, which may have begun to write.

    Returns:
        the store's header and the process's manifest.

    Raises:
        ValueError: the store is refused.
        OSError: the directory cannot be written.
    """
    manifests = read_manifests(directory)
    theirs = _known_header(directory, manifests)
    opening = decide_opening(ours, theirs, manifests, resume_step, rank)
    if opening.action == "refuse":
        raise ValueError(f"Cannot record to {directory}: {opening.reason}")
    if opening.action == "set_aside":
        aside = set_aside(directory)
        message = f"Renamed {directory} to {aside.name}: {opening.reason}."
        warnings.warn(message, stacklevel=3)
        theirs, manifests = None, []
    found = Manifest(rank, 0)
    for manifest in manifests:
        if manifest.rank == rank or manifest.rank >= world_size:
            kept = _drop_later_rows(directory, manifest, resume_step)
            found = kept if manifest.rank == rank else found
    own = replace(found, world_size=max(world_size, found.world_size))
    if theirs is None:
        create_store(directory, opening.header, own)
    elif opening.header != theirs:
        write_header(directory, opening.header)
    if theirs is not None and own != found:
        write_manifest(directory, own)
    return opening.header, own


def create_store(directory: Path, header: Header, manifest: Manifest) -> None:
    """Write a header and a process's manifest: both are there, or neither.

    Raises:
        OSError: the directory cannot be written.
    """
    try:
        if directory.is_dir():
            write_manifest(directory, manifest)
            write_header(directory, header)
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        made = directory.with_name(directory.name + ".tmp")
        made.mkdir(exist_ok=True)
        write_manifest(made, manifest)
        write_header(made, header)
        made.replace(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write sketches to {directory} ({error.strerror}). Give the Trainer"
            " an output_dir that can be written.",
        ) from error


def _known_header(directory: Path, manifests: Sequence[Manifest]) -> Header | None:
    """Return the store's header; None if there is none, or a bad one without rows."""
    if not (directory / HEADER).exists():
        return None
    try:
        return read_header(directory)
    except ValueError:
        if any(manifest.shards for manifest in manifests):
            raise
        return None


def _drop_later_rows(directory: Path, manifest: Manifest, last_step: int) -> Manifest:
    """Drop the rows of steps after `last_step`, and return what the manifest says."""
    later = [shard for shard in manifest.shards if shard.last_step > last_step]
    gaps = tuple(gap for gap in manifest.gaps if gap.first_step <= last_step)
    if not later and gaps == manifest.gaps:
        return manifest
    kept = [shard for shard in manifest.shards if shard not in later]
    crossing = [shard for shard in later if shard.first_step <= last_step]
    for number, shard in enumerate(crossing, manifest.next_number):
        table = read_shard(directory, shard)
        earlier = table.filter(pa.array(table["step"].to_numpy() <= last_step))
        kept.append(write_shard(directory, shard.kind, manifest.rank, number, earlier))
    changed = replace(manifest, shards=tuple(kept), gaps=gaps)
    write_manifest(directory, changed)
    for shard in later:
        (directory / shard.file).unlink(missing_ok=True)
    return changed
