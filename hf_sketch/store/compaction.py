"""Small files of a store become few large ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pyarrow as pa
from tqdm.auto import tqdm

from hf_sketch.store.header import read_header
from hf_sketch.store.lock import locked
from hf_sketch.store.log import read_logs, remove_leftovers
from hf_sketch.store.maintenance import replace_manifest
from hf_sketch.store.manifest import KINDS, Manifest, shards_of
from hf_sketch.store.shards import Shard, read_shard, write_shard

LEAST_BYTES: Final = 2**28
_MAPPED_FILES: Final = 4096


def compact(directory: Path, least_bytes: int = LEAST_BYTES) -> list[str]:
    """Join a store's small files, in place.

    Each process's rows stay its own, in their order. New files are there before one
    new manifest lists them instead of the old ones, which are removed then: a crash
    loses no row, and repeating the call ends what it has begun.

    Args:
        directory: the store.
        least_bytes: files of this length stay; smaller ones are joined until they have
            it, so a new file is shorter than twice this. The last one of each kind may
            be shorter.

    Returns:
        what was done.

    Raises:
        ValueError: a file is damaged, or a run is writing.
        OSError: there is no room: the rows are there twice for a while.
    """
    header, done = read_header(directory), list[str]()
    with locked(directory):
        for log in read_logs(directory):
            manifest = log.manifest
            groups = [g for kind in KINDS for g in _groups(manifest, kind, least_bytes)]
            joined = [group for group in groups if len(group) > 1]
            if joined:
                # If this is cut off, files of these numbers are there without a line.
                number = manifest.next_number
                reserved = replace(manifest, numbers=number - 1 + len(joined))
                replace_manifest(directory, header, reserved)
                kept = [*_join(directory, manifest.rank, number, groups)]
                manifest = reserved.with_shards(kept)
                replace_manifest(directory, header, manifest)
                before = sum(map(len, groups))
                done.append(
                    f"{directory}: {before} files of process {manifest.rank} became "
                    f"{len(kept)}"
                )
            remove_leftovers(directory, manifest)
    return done


def _groups(manifest: Manifest, kind: str, least_bytes: int) -> Iterator[list[Shard]]:
    """Split a process's files, by step, into those that become one."""
    group: list[Shard] = []
    for shard in shards_of([manifest], kind):
        if shard.size_bytes >= least_bytes and group:
            yield group
            group = []
        group.append(shard)
        if sum(one.size_bytes for one in group) >= least_bytes:
            yield group
            group = []
    if group:
        yield group


def _join(
    directory: Path, rank: int, number: int, groups: Iterable[Sequence[Shard]]
) -> Iterator[Shard]:
    """Write one file for each group of several, and yield those that stay."""
    for group in tqdm(list(groups), desc="Joining files"):
        if len(group) == 1:
            yield group[0]
            continue
        table = _rows(directory, group)
        yield write_shard(directory, group[0].kind, rank, number, table)
        number += 1


def _rows(directory: Path, group: Sequence[Shard]) -> pa.Table:
    """Return the rows of all files; some thousand are mapped at a time.

    Linux maps 65,530 files per process, and this many of a few rows fill one.
    """
    parts: list[pa.Table] = []
    for low in range(0, len(group), _MAPPED_FILES):
        some = group[low : low + _MAPPED_FILES]
        mapped = pa.concat_tables([read_shard(directory, shard) for shard in some])
        parts.append(mapped.combine_chunks())
    return pa.concat_tables(parts)
