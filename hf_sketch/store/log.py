"""A process's manifest on disk: a snapshot, then one line for each flush.

docs/format.md is the format. Readers see whole lines only: what a crash has left of the
last one counts for nothing, as the rows that it lists were never said to be there.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final

import xxhash

from hf_sketch.durable import append_file, parse_object, replace_file
from hf_sketch.store.manifest import (
    KINDS,
    Gap,
    Manifest,
    manifest_of,
    read_version_1,
)
from hf_sketch.store.shards import Shard, shard_name

_LOG, _VERSION_1, _FULL = ".jsonl", ".json", ".full"
_NAME: Final = re.compile(r"manifest-(\d{5,})\.jsonl?")
_PART: Final = re.compile(r"manifest-\d{5,}\.(jsonl?|full)")
_LENGTH: Final = re.compile(rb'\{"bytes": *(\d{1,10}),')
_HEAD: Final = b'{"bytes":%10d,"xxh3_128":"%s",'
_NO_DIGEST: Final = b"0" * 32
_HEAD_BYTES: Final = len(_HEAD % (0, _NO_DIGEST))
_DIGEST_AT: Final = slice(_HEAD_BYTES - 34, _HEAD_BYTES - 2)
_SNAPSHOT_ENTRIES: Final = 1000


@dataclass(frozen=True)
class Log:
    """A process's manifest, and where its file ends.

    Args:
        manifest: what the file says.
        size_bytes: length of the file; 0 if the next entry needs a new file, since this
            one is of version 1, ends in half a line, or cannot say that the disk was
            full.
        snapshot_bytes: length of its first line.
        entries: number of lines after that.
        digest: digest of the last line, which the next one is chained to.
    """

    manifest: Manifest
    size_bytes: int = 0
    snapshot_bytes: int = 0
    entries: int = 0
    digest: bytes = b""

    def append(
        self, directory: Path, shards: Sequence[Shard] = (), gaps: Sequence[Gap] = ()
    ) -> "Log":
        """Add an entry, on disk when this returns, and return the longer log.

        Every thousand entries, if the file has grown to twice its snapshot, a new
        snapshot replaces it: what is written grows with the number of entries alone.

        Raises:
            OSError: it cannot be written; the file is as before.
        """
        manifest = self.manifest.plus(shards, gaps)
        many = self.entries + 1 >= _SNAPSHOT_ENTRIES
        if not self.size_bytes or (many and self.size_bytes >= 2 * self.snapshot_bytes):
            return write_log(directory, manifest)
        line, digest = _sealed_line(_content(shards, gaps), self.digest)
        append_file(_path(directory, manifest.rank), self.size_bytes, line)
        return replace(
            self,
            manifest=manifest,
            size_bytes=self.size_bytes + len(line),
            entries=self.entries + 1,
            digest=digest,
        )


def write_log(directory: Path, manifest: Manifest) -> Log:
    """Replace a process's manifest in one step: readers see the old or the new one.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    content = {
        "rank": manifest.rank,
        "world_size": manifest.world_size,
        "numbers": manifest.numbers,
        **_content(manifest.shards, manifest.gaps),
    }
    line, digest = _sealed_line(content, b"")
    path = _path(directory, manifest.rank)
    replace_file(path, line)
    for old in (_VERSION_1, _FULL):
        path.with_suffix(old).unlink(missing_ok=True)
    return Log(manifest, len(line), len(line), 0, digest)


def mark_full(directory: Path, rank: int) -> None:
    """Note that rows after those of a manifest are missing, where no entry fits.

    The note is an empty file: a full disk has room for a name, but for no byte.

    Raises:
        OSError: there is no room for that either.
    """
    _path(directory, rank).with_suffix(_FULL).touch()


def manifest_files(names: Iterable[str]) -> list[str]:
    """Return the names of manifests, by rank, of which version 2 comes before 1."""
    found: dict[int, str] = {}
    for name in sorted(names):  # ".json" before ".jsonl"
        if match := _NAME.fullmatch(name):
            found[int(match[1])] = name
    return [found[rank] for rank in sorted(found)]


def is_of_manifest(name: str) -> bool:
    """Return whether a file of this name is a manifest, or says more of one."""
    return bool(_PART.fullmatch(name))


def entry_bytes(shards: Sequence[Shard]) -> int:
    """Return the length of the entry of a flush."""
    return len(_sealed_line(_content(shards, []), b"")[0])


def file_names(directory: Path) -> frozenset[str]:
    """Return the names of all files of a store; none without one.

    Listed before the manifests are read, since those of a run that goes on name more.
    """
    if not directory.is_dir():
        return frozenset()
    return frozenset(os.listdir(directory))  # noqa: PTH208 - paths take ten times as long


def read_logs(directory: Path) -> list[Log]:
    """Read the manifests of all processes that have one, by rank.

    Raises:
        ValueError: one was changed, or lists what is no file of the store.
    """
    names = file_names(directory)
    return [read_log(directory / name, names) for name in manifest_files(names)]


def read_manifests(directory: Path) -> list[Manifest]:
    """Read the manifests of all processes that have one, by rank.

    Raises:
        ValueError: one was changed, or lists what is no file of the store.
    """
    return [log.manifest for log in read_logs(directory)]


def read_log(path: Path, names: frozenset[str]) -> Log:
    """Read one process's manifest, of any version.

    Args:
        path: the file.
        names: files that were in its directory before.

    Raises:
        ValueError: the file was changed, or lists what is no file of the store.
    """
    if path.suffix == _VERSION_1:
        log = Log(read_version_1(path))
    else:
        log = _read_lines(path)
        _check_end(path, log.manifest, names)
    if path.with_suffix(_FULL).exists():
        gap = Gap(log.manifest.last_step + 1, "the disk was full")
        log = replace(log, manifest=log.manifest.plus((), [gap]), size_bytes=0)
    return log


def remove_leftovers(directory: Path, manifest: Manifest) -> None:
    """Remove a process's files that its log does not list, and what the log replaced.

    They are those that it has replaced or dropped, and those of a flush that a crash
    has cut off. No other process may be writing them.
    """
    log = _path(directory, manifest.rank)
    if log.exists():
        log.with_suffix(_VERSION_1).unlink(missing_ok=True)
    listed = {shard.file for shard in manifest.shards}
    for kind in KINDS:
        for path in directory.glob(f"{kind}-{manifest.rank:05d}-*.arrow*"):
            if path.name not in listed:
                path.unlink(missing_ok=True)


def torn_bytes(path: Path) -> int:
    """Return how many bytes of an entry a manifest ends in that is not whole."""
    if path.suffix != _LOG:
        return 0
    data = path.read_bytes()
    return len(data) - (data.rfind(b"\n") + 1)


def _path(directory: Path, rank: int) -> Path:
    return directory / f"manifest-{rank:05d}{_LOG}"


def _content(shards: Sequence[Shard], gaps: Sequence[Gap]) -> dict[str, Any]:
    """What a line says of files, whose names follow from the rest, and gaps."""
    rows = [[shard.kind, shard.number, *astuple(shard)[2:]] for shard in shards]
    return {"shards": rows, "gaps": [astuple(gap) for gap in gaps]}


def _sealed_line(content: Mapping[str, Any], before: bytes) -> tuple[bytes, bytes]:
    """Return a line with its length and digest, and the digest."""
    rest = json.dumps(content, separators=(",", ":")).encode()[1:] + b"\n"
    size = _HEAD_BYTES + len(rest)
    digest = _digest(before, _HEAD % (size, _NO_DIGEST) + rest)
    return _HEAD % (size, digest) + rest, digest


def _digest(before: bytes, blank: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(before + blank).encode()


def _read_lines(path: Path) -> Log:
    """Read a file of version 2; half a line at its end counts for nothing."""
    *lines, tail = path.read_bytes().split(b"\n")
    if not lines or not _is_torn(tail):
        raise _damaged(path, f"line {1 + len(lines)} is not whole")
    digest = b""
    contents: list[dict[str, Any]] = []
    sizes: list[int] = []
    for number, line in enumerate(lines, 1):
        line += b"\n"
        found = line[_DIGEST_AT]
        digest = _digest(digest, (_HEAD % (len(line), _NO_DIGEST)) + line[_HEAD_BYTES:])
        if not line.startswith(_HEAD % (len(line), digest)):
            got = ascii(found.decode("latin-1"))[1:-1]
            raise _damaged(
                path,
                f"line {number} must have the digest {digest.decode()} of what is up to"
                f" its end, got {got}",
            )
        contents.append(parse_object(path, line))
        sizes.append(len(line))
    size = 0 if tail else sum(sizes)
    return Log(manifest_of(path, contents), size, sizes[0], len(lines) - 1, digest)


def _is_torn(tail: bytes) -> bool:
    """Return whether what follows the last line is nothing, or the start of a line.

    A line of full length without its end was changed. After a power cut, the rest of a
    line may be there as zeros.
    """
    tail = tail.rstrip(b"\0")
    said = _LENGTH.match(tail)
    return len(tail) < (_HEAD_BYTES if said is None else int(said[1]))


def _check_end(path: Path, manifest: Manifest, names: frozenset[str]) -> None:
    """Raise if the lines that list the latest files are gone.

    A crash leaves the files of one flush without a line, one of each kind.
    """
    first = manifest.next_number
    for kind in KINDS:
        later = [shard_name(kind, manifest.rank, first + more) for more in range(4)]
        if len(names.intersection(later)) > 1:
            raise _damaged(path, f"it lacks {min(names.intersection(later))}")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} was changed or cut: {what}. Restore it, or run hf-sketch repair "
        f"{path.parent}."
    )
