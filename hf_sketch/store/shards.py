"""Arrow files of a store, each written whole and listed with its digests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset, Features
from datasets.table import ConcatenationTable, MemoryMappedTable

from hf_sketch.durable import Draft, sync_directory

_READ_BYTES = 2**20
_VERIFIED_BYTES = 2**30


@dataclass(frozen=True)
class Shard:
    """One Arrow file of the store, as the manifest lists it.

    Args:
        file: its name within the store's directory.
        kind: "per_example" or "per_step".
        rows: how many rows it holds.
        first_step: the least optimizer step among them, counted from 1.
        last_step: the greatest.
        size_bytes: the file's length.
        head_bytes: where the columns start, after all that describes them.
        head_xxh3_128: digest of what comes before, in hexadecimal.
        xxh3_128: digest of the file.
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
        return int(Path(self.file).stem.rsplit("-", 1)[1])


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
    """Write rows as one Arrow file that is not synced and has no name of its own yet.

    Raises:
        OSError: it cannot be written.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    data = memoryview(sink.getvalue())
    path = directory / f"{kind}-{rank:05d}-{number:06d}.arrow"
    return Draft(path, data), _describe(path.name, data, table)


def describe_shard(path: Path) -> Shard:
    """What the manifest should say of a file, as far as the file itself tells.

    Raises:
        pyarrow.ArrowInvalid: it holds no rows that can be read.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)
        source.seek(0)
        return _describe(path.name, memoryview(source.read_buffer()), table)


def read_shard(directory: Path, shard: Shard) -> pa.Table:
    """The shard's rows, memory-mapped.

    Raises:
        ValueError: the file is missing, or differs from what was written.
    """
    check_shard(directory, shard, contents=True)
    with pa.memory_map(str(directory / shard.file)) as source:
        return pa.ipc.open_stream(source).read_all()


def check_shard(directory: Path, shard: Shard, contents: bool) -> None:
    """Raise ValueError unless the shard's file is as it was written.

    Args:
        directory: of the store.
        shard: what the manifest says of it.
        contents: read and compare all of it, not only its length and its head.
    """
    path = directory / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.size_bytes:
        got = "no such file" if size is None else f"{size} bytes"
        raise ValueError(
            f"{path} must have {shard.size_bytes} bytes, got {got}: {_mend(directory)}"
        )
    limit = shard.size_bytes if contents else shard.head_bytes
    expected = shard.xxh3_128 if contents else shard.head_xxh3_128
    digest = _file_digest(path, limit)
    if digest != expected:
        raise ValueError(
            f"{path} must have the digest {expected} in its first {limit} bytes, got "
            f"{digest}: {_mend(directory)}"
        )


def contents_are_checked(shards: Sequence[Shard]) -> bool:
    """Whether opening compares every byte: of 1 GiB at most."""
    return sum(shard.size_bytes for shard in shards) <= _VERIFIED_BYTES


def open_shards(directory: Path, shards: Sequence[Shard], columns: Features) -> Dataset:
    """All rows, memory-mapped, in the order of the shards."""
    if not shards:
        empty: dict[str, list[Any]] = {name: [] for name in columns}
        return Dataset.from_dict(empty, features=columns)
    files = [str(directory / shard.file) for shard in shards]
    tables = [MemoryMappedTable.from_file(file) for file in files]
    digests = "".join(shard.xxh3_128 for shard in shards).encode()
    fingerprint = xxhash.xxh3_64_hexdigest(digests)  # `datasets` would pickle all names
    return Dataset(ConcatenationTable.from_tables(tables), fingerprint=fingerprint)


def _describe(name: str, data: memoryview, table: pa.Table) -> Shard:
    """The entry of a file with these bytes and rows."""
    steps, head = table["step"].to_numpy(), _head_bytes(data)
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


def _mend(directory: Path) -> str:
    return (
        f"restore the file, set it aside with hf-sketch repair {directory}, or read the"
        " others with load_sketches(..., skip_damaged=True)."
    )


def _head_bytes(data: memoryview) -> int:
    """Where the body of the only record batch starts."""
    messages = list(_messages(data))
    body = messages[-1].body
    end_of_stream = 8
    return data.nbytes - end_of_stream - (0 if body is None else body.size)


def _messages(data: memoryview) -> Iterator[Any]:
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _file_digest(path: Path, limit: int) -> str:
    """Digest of a file's first bytes, read in parts."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while limit > 0 and (part := file.read(min(limit, _READ_BYTES))):
            digest.update(part)
            limit -= len(part)
    return digest.hexdigest()
