"""Small files of a store become few large ones."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from hf_sketch.durable import Draft, sync_directory
from hf_sketch.store.header import read_header
from hf_sketch.store.lock import locked
from hf_sketch.store.log import Log, read_logs, remove_leftovers, write_log
from hf_sketch.store.maintenance import replace_manifest
from hf_sketch.store.manifest import KINDS, Manifest, shards_of
from hf_sketch.store.shards import Shard, draft_shard, read_shard

LEAST_BYTES: Final = 7 * 2**27
MOST_FILES: Final = 1000
_FEW_FILES: Final = 4


def compact(directory: Path, least_bytes: int = LEAST_BYTES) -> list[str]:
    """Join a store's small files, in place.

    Each process's rows stay its own, in their order. A new file is there before a new
    manifest lists it instead of the old ones, which are removed then: a crash loses no
    row, and repeating the call ends what it has begun.

    Args:
        directory: the store.
        least_bytes: files of this length stay; smaller ones are joined until they have
            it, so a new file is shorter than twice this. The last one of each kind may
            be shorter.

    Returns:
        what was done.

    Raises:
        ValueError: a file is damaged, or a run is writing.
        OSError: there is no room: the rows of one new file are there three times for a
            while.
    """
    header, done = read_header(directory), list[str]()
    with locked(directory):
        for log in read_logs(directory):
            groups = small_files(log.manifest, least_bytes)
            if groups:
                replace_manifest(directory, header, log.manifest)
            for group in tqdm(groups, desc="Joining files", disable=not groups):
                number = log.manifest.next_number
                log = put_in_place(directory, log, *join(directory, group, number))
            if groups:
                before = sum(map(len, groups))
                done.append(
                    f"{directory}: {before} files of process {log.manifest.rank} became"
                    f" {len(groups)}"
                )
            remove_leftovers(directory, log.manifest)
    return done


def small_files(manifest: Manifest, least_bytes: int) -> list[list[Shard]]:
    """Return the files of a process, by step, of which several become one each."""
    groups = [g for kind in KINDS for g in _groups(manifest, kind, least_bytes)]
    return [group for group in groups if len(group) > 1]


def is_many(groups: Sequence[Sequence[object]]) -> bool:
    """Return whether joining these files is worth writing their rows once more."""
    return any(len(group) > _FEW_FILES for group in groups)


def newest_files(manifest: Manifest, kind: str, least_bytes: int) -> list[Shard]:
    """Return a process's latest small files once they are long enough for a large one.

    A thousand of the very smallest are enough as well: they become one of middle length
    that is joined with others later, so that each row is written three times at most.
    """
    group: list[Shard] = []
    size = 0
    tiny = True
    for shard in reversed(manifest.shards):
        if shard.kind != kind:
            continue
        if shard.size_bytes >= least_bytes:
            break
        tiny = tiny and shard.size_bytes < least_bytes / MOST_FILES
        group.append(shard)
        size += shard.size_bytes
        if size >= least_bytes or (tiny and len(group) == MOST_FILES):
            return sorted(reversed(group), key=lambda shard: shard.first_step)
    return []


def join(
    directory: Path, group: Sequence[Shard], number: int
) -> tuple[Draft, Shard, Sequence[Shard]]:
    """Write the rows of some files to one, under a temporary name.

    Their columns pass through files without names: memory does not grow with them.

    Returns:
        the new file, its entry, and the group.

    Raises:
        ValueError: one of the files is damaged.
        OSError: there is no room.
    """
    first = group[0]
    rank = int(first.file.split("-")[1])
    table = _rows(directory, group)
    draft, shard = draft_shard(directory, first.kind, rank, number, table)
    return draft, shard, group


def put_in_place(
    directory: Path, log: Log, draft: Draft, shard: Shard, group: Sequence[Shard]
) -> Log:
    """Name a joined file, list it instead of others, and remove those."""
    draft.finish()
    sync_directory(directory)
    old = {one.file for one in group}
    kept = [one for one in log.manifest.shards if one.file not in old]
    kept.insert(log.manifest.shards.index(group[0]), shard)
    log = write_log(directory, log.manifest.with_shards(kept))
    for name in old:
        (directory / name).unlink(missing_ok=True)
    return log


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


def _rows(directory: Path, group: Sequence[Shard]) -> pa.Table:
    """Return the rows of all files, each column mapped from a file without a name."""
    schema: pa.Schema = read_shard(directory, group[0]).schema
    columns: dict[str, IO[bytes]] = {}
    with ExitStack() as files:
        for name in schema.names:
            columns[name] = files.enter_context(TemporaryFile(dir=directory))
        for shard in group:  # one is mapped at a time
            table = read_shard(directory, shard)
            for name, file in columns.items():
                for chunk in table[name].chunks:
                    numbers = chunk.flatten() if _is_list(chunk.type) else chunk
                    plain = numbers.to_numpy(zero_copy_only=False)
                    file.write(memoryview(plain).cast("B"))
        rows = sum(shard.rows for shard in group)
        arrays = [_mapped(field.type, rows, columns[field.name]) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _mapped(kind: pa.DataType, rows: int, file: IO[bytes]) -> pa.Array:
    """Return a column whose numbers are in a file; bools take a byte there."""
    file.flush()
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if pa.types.is_boolean(kind):
        return pa.array(np.frombuffer(data, dtype=bool))
    inner, count = kind, rows
    if _is_list(kind):
        inner, count = kind.value_type, rows * kind.list_size
    numbers = pa.Array.from_buffers(inner, count, [None, pa.py_buffer(data)])
    if _is_list(kind):
        return pa.FixedSizeListArray.from_arrays(numbers, type=kind)
    return numbers


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)
