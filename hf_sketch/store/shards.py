"""Arrow files of a store, each written whole and listed with its checksums."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash
from datasets import Dataset, Features
from datasets.table import ConcatenationTable, MemoryMappedTable

from hf_sketch.durable import Draft, sync_directory
from hf_sketch.store.checks.arrow_head import read_head

_READ_BYTES = 2**20
_END_BYTES = 8  # what ends an Arrow stream


@dataclass(frozen=True)
class Shard:
    """One Arrow file of the store, as the manifest lists it.

    Args:
        file: its name within the store's directory.
        kind: "per_example", "per_step" or "update".
        rows: number of rows.
        first_step: the smallest optimizer step among them, counted from 1.
        last_step: the greatest.
        size_bytes: length of the file.
        head_bytes: where the columns start, after all that describes them.
        head_xxh3_128: checksum of the bytes before, in hexadecimal.
        xxh3_128: checksum of the file.
    """

    file: str
    kind: str
    rows: int
    first_step: int
    last_step: int
    size_bytes: int
    head_bytes: int
    head_xxh3_128: str
    xxh3_128: str

    @property
    def number(self) -> int:
        """The running number in the file's name."""
        return int(Path(self.file).stem.rpartition("-")[2])


def shard_name(kind: str, rank: int, number: int) -> str:
    """Return the name of a process's file."""
    return f"{kind}-{rank:05d}-{number:06d}.arrow"


def write_shard(
    directory: Path, kind: str, rank: int, number: int, table: pa.Table
) -> Shard:
    """Write rows as one Arrow file, complete and synced before it gets its name.

    Raises:
        OSError: it cannot be written.
    """
    draft, shard = draft_shard(directory, kind, rank, number, table)
    draft.finish()
    sync_directory(directory)
    return shard


def draft_shard(
    directory: Path, kind: str, rank: int, number: int, table: pa.Table
) -> tuple[Draft, Shard]:
    """Write rows as one Arrow file, not yet synced and under a temporary name.

    Raises:
        OSError: it cannot be written.
    """

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    name = shard_name(kind, rank, number)
    draft = Draft(directory / name, b"")
    draft.extend(write)
    return draft, _describe(name, draft.data, table)


def describe_shard(path: Path) -> Shard:
    """Return what a file's manifest should say of it.

    Raises:
        ValueError: it holds no rows that can be read.
    """
    read_head(path)
    with _readable(path), pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)
        source.seek(0)
        return _describe(path.name, memoryview(source.read_buffer()), table)


def read_shard(directory: Path, shard: Shard) -> pa.Table:
    """Return the shard's rows, memory-mapped.

    Raises:
        ValueError: the file is missing, or differs from what was written.
    """
    check_shard(directory, shard, contents=True)
    path = directory / shard.file
    with _readable(path), pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def check_shard(directory: Path, shard: Shard, contents: bool) -> None:
    """Raise ValueError unless the shard's file is as it was written.

    Args:
        directory: the store.
        shard: the file's entry in the manifest.
        contents: compare all of it, not only its length and its head.
    """
    path = directory / shard.file
    fix = (
        f"Restore it, set it aside with hf-sketch repair {directory}, or read the other"
        " files with load_sketches(..., skip_damaged=True)."
    )
    if not path.is_file():
        raise ValueError(f"{path} is missing. {fix}")
    size = path.stat().st_size
    if size != shard.size_bytes:
        raise ValueError(f"{path} has {size} bytes, not {shard.size_bytes}. {fix}")
    limit, expected = shard.head_bytes, shard.head_xxh3_128
    if contents:
        limit, expected = shard.size_bytes, shard.xxh3_128
    digest = _file_digest(path, limit)
    if digest != expected:
        raise ValueError(
            f"{path} was changed: the checksum of its first {limit} bytes is {digest}, "
            f"not {expected}. {fix}"
        )
    head = read_head(path)
    if (head.rows, head.size_bytes) != (shard.rows, shard.head_bytes):
        raise ValueError(
            f"{path} has {head.rows} rows from byte {head.size_bytes} on, its manifest "
            f"says {shard.rows} rows from byte {shard.head_bytes} on. {fix}"
        )


def open_shards(directory: Path, shards: Sequence[Shard], columns: Features) -> Dataset:
    """Return all rows, memory-mapped, in the order of the shards.

    Raises:
        ValueError: a file has other columns.
    """
    if not shards:
        empty: dict[str, list[Any]] = {name: [] for name in columns}
        return Dataset.from_dict(empty, features=columns)
    files = [str(directory / shard.file) for shard in shards]
    schema = columns.arrow_schema
    tables: list[MemoryMappedTable] = []
    for file in files:
        with _readable(file):
            tables.append(MemoryMappedTable.from_file(file))
        if not tables[-1].schema.equals(schema):
            raise ValueError(
                f"{file} has the columns {tables[-1].schema.names} of other types than "
                "the store's header says. Get the store from somebody you trust."
            )
    digests = "".join(shard.xxh3_128 for shard in shards).encode()
    fingerprint = xxhash.xxh3_64_hexdigest(digests)  # `datasets` would pickle all names
    return Dataset(ConcatenationTable.from_tables(tables), fingerprint=fingerprint)


@contextmanager
def _readable(path: Path | str) -> Generator[None]:
    """Say of which file Arrow cannot read what was found sound before."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read by Arrow: {error}.") from None


def _describe(name: str, data: memoryview, table: pa.Table) -> Shard:
    """Return the entry of a file with these bytes and rows."""
    steps = table["step"].to_numpy()
    *_, batch = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
    head = data.nbytes - _END_BYTES - (0 if batch.body is None else batch.body.size)
    return Shard(
        file=name,
        kind=name.partition("-")[0],
        rows=table.num_rows,
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        size_bytes=data.nbytes,
        head_bytes=head,
        head_xxh3_128=xxhash.xxh3_128_hexdigest(data[:head]),
        xxh3_128=xxhash.xxh3_128_hexdigest(data),
    )


def _file_digest(path: Path, limit: int) -> str:
    """Return the checksum of a file's first bytes, read in parts."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while limit > 0 and (part := file.read(min(limit, _READ_BYTES))):
            digest.update(part)
            limit -= len(part)
    return digest.hexdigest()
