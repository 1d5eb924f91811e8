"""What a run does with the store that it finds: decided once, then done."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

from hf_sketch.durable import set_aside, sync_directory
from hf_sketch.store.header import (
    HEADER,
    Header,
    is_current,
    read_header,
    write_header,
)
from hf_sketch.store.lock import errors_explained
from hf_sketch.store.log import Log, read_logs, remove_leftovers, write_log
from hf_sketch.store.manifest import Manifest
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
        manifests: manifests of the store.
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
) -> tuple[Header, Log]:
    """Make a store ready for one process's rows.

    A process drops later rows of its own, and of ranks that take part no longer, but
    never those of another process, which may have begun to write.

    Returns:
        the store's header, and the process's log.

    Raises:
        ValueError: the store is refused.
        OSError: the directory cannot be written.
    """
    logs = read_logs(directory)
    manifests = [log.manifest for log in logs]
    theirs = _known_header(directory, manifests)
    opening = decide_opening(ours, theirs, manifests, resume_step, rank)
    if opening.action == "refuse":
        raise ValueError(f"Cannot record to {directory}: {opening.reason}")
    if opening.action == "set_aside":
        aside = set_aside(directory)
        message = f"Renamed {directory} to {aside.name}: {opening.reason}."
        warnings.warn(message, stacklevel=3)
        theirs, logs = None, []
    if theirs is not None:
        _update_header(directory, theirs, opening.header)
    gone = [log for log in logs if log.manifest.rank >= world_size]
    mine = [log for log in logs if log.manifest.rank == rank]
    for log in gone:
        _drop_later_rows(directory, log, resume_step)
    own = Log(Manifest(rank, world_size))
    for log in mine:
        own = _drop_later_rows(directory, log, resume_step, world_size)
    if theirs is None:
        own = create_store(directory, opening.header, own.manifest)
    elif not own.size_bytes:
        own = write_log(directory, own.manifest)
    return opening.header, own


def _update_header(directory: Path, old: Header, new: Header) -> None:
    """Write the header if it changed, or if releases that know no logs would read it.

    Those must refuse the store before one of its manifests is a log.
    """
    if new != old or not is_current(directory):
        write_header(directory, new)


def create_store(directory: Path, header: Header, manifest: Manifest) -> Log:
    """Write a header and a process's manifest: both are there, or neither.

    Raises:
        OSError: the directory cannot be written.
    """
    with errors_explained(directory):
        if directory.is_dir():
            log = write_log(directory, manifest)
            write_header(directory, header)
            return log
        directory.parent.mkdir(parents=True, exist_ok=True)
        made = directory.with_name(directory.name + ".tmp")
        made.mkdir(exist_ok=True)
        log = write_log(made, manifest)
        write_header(made, header)
        made.replace(directory)
        sync_directory(directory.parent)
        return log


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


def _drop_later_rows(
    directory: Path, log: Log, last_step: int, world_size: int = 0
) -> Log:
    """Drop the rows of steps after `last_step`, and return what is left.

    The new manifest is there before an old file goes, so a crash in between leaves one
    or the other.
    """
    manifest = log.manifest
    later = [shard for shard in manifest.shards if shard.last_step > last_step]
    kept = [shard for shard in manifest.shards if shard not in later]
    crossing = [shard for shard in later if shard.first_step <= last_step]
    for number, shard in enumerate(crossing, manifest.next_number):
        table = read_shard(directory, shard)
        earlier = table.filter(pa.array(table["step"].to_numpy() <= last_step))
        kept.append(write_shard(directory, shard.kind, manifest.rank, number, earlier))
    changed = replace(
        manifest.with_shards(kept) if later else manifest,
        gaps=tuple(gap for gap in manifest.gaps if gap.first_step <= last_step),
        world_size=max(world_size, manifest.world_size),
    )
    if changed != manifest or not log.size_bytes:
        log = write_log(directory, changed)
    remove_leftovers(directory, changed)
    return log
