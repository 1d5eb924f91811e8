"""What each process has written to a store: its files, and the steps that lack rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hf_sketch.durable import printable, read_sealed
from hf_sketch.store.checks.arrow_head import MOST_HEAD_BYTES
from hf_sketch.store.checks.schema import (
    BYTES,
    PROCESSES,
    STEPS,
    check_content,
    digest,
    many,
    nullable,
    one_of,
    record,
    row,
    text,
    whole,
)
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, UPDATE
from hf_sketch.store.shards import Shard, shard_name

KINDS: Final = (PER_EXAMPLE, PER_STEP, UPDATE)
_FIX: Final = "Get the store from somebody you trust, or run hf-sketch repair on it."
_COUNTS: Final = {
    "rows": whole(1, BYTES),
    "first_step": whole(0, STEPS),
    "last_step": whole(0, STEPS),
    "size_bytes": whole(0, BYTES),
    "head_bytes": whole(0, MOST_HEAD_BYTES),
    "head_xxh3_128": digest,
    "xxh3_128": digest,
}
_GAP: Final = {
    "first_step": whole(0, STEPS + 1),
    "reason": text,
    "last_step": nullable(whole(0, STEPS)),
}
_RANK: Final = whole(0, PROCESSES - 1)
_WORLD_SIZE: Final = whole(1, PROCESSES)
_SHARD: Final = row(one_of(*KINDS), whole(1, BYTES), *_COUNTS.values())
_LINE: Final = {
    "bytes": whole(0, BYTES),
    "xxh3_128": digest,
    "shards": many(_SHARD),
    "gaps": many(row(*_GAP.values())),
}
_ENTRY: Final = record(_LINE, closed=False)
_FIRST: Final = {"rank": _RANK, "world_size": _WORLD_SIZE, "numbers": whole(0, BYTES)}
_SNAPSHOT: Final = record({**_LINE, **_FIRST}, closed=False)
_VERSION_1: Final = record(
    {
        "rank": _RANK,
        "world_size": _WORLD_SIZE,
        "shards": many(record({"file": text, "kind": one_of(*KINDS), **_COUNTS})),
        "gaps": many(record(_GAP)),
    },
    closed=False,
)


@dataclass(frozen=True)
class Gap:
    """Steps whose rows are missing.

    Args:
        first_step: the first of them.
        reason: why they are missing.
        last_step: the last of them; None if recording stopped until training was
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
        rank: rank of the process.
        world_size: the most processes that took part in a run beside it.
        shards: its files, in the order in which they were written.
        gaps: steps that lack rows.
        numbers: the greatest running number of its files that are gone; 0 for none.
    """

    rank: int = 0
    world_size: int = 1
    shards: tuple[Shard, ...] = ()
    gaps: tuple[Gap, ...] = ()
    numbers: int = 0

    @property
    def last_step(self) -> int:
        """The greatest step that has a row; 0 for none."""
        return max((shard.last_step for shard in self.shards), default=0)

    @property
    def next_number(self) -> int:
        """The running number of its next file, greater than all before."""
        return 1 + max([self.numbers, *(shard.number for shard in self.shards)])

    def plus(self, shards: Sequence[Shard], gaps: Sequence[Gap] = ()) -> "Manifest":
        """Return it with more files and gaps."""
        return replace(self, shards=(*self.shards, *shards), gaps=(*self.gaps, *gaps))

    def with_shards(self, shards: Sequence[Shard]) -> "Manifest":
        """Return it with other files; numbers of those that go are not used again."""
        return replace(self, shards=tuple(shards), numbers=self.next_number - 1)


def rank_of(name: str) -> int:
    """Return the rank in the name of a manifest."""
    return int(Path(name).stem.rpartition("-")[2])


def missing_ranks(manifests: Sequence[Manifest]) -> list[int]:
    """Return the ranks that took part and left no manifest."""
    there = {manifest.rank for manifest in manifests}
    count = max((manifest.world_size for manifest in manifests), default=1)
    return [rank for rank in range(count) if rank not in there]


def shards_of(manifests: Sequence[Manifest], kind: str) -> list[Shard]:
    """Return all shards of a kind, by step, then by rank."""
    shards = [s for m in manifests for s in m.shards if s.kind == kind]
    return sorted(shards, key=lambda shard: shard.first_step)


def manifest_of(path: Path, contents: Sequence[Mapping[str, Any]]) -> Manifest:
    """Return what the lines of a log say together.

    Raises:
        ValueError: they list what is no file of the store.
    """
    rank = rank_of(path.name)
    for number, content in enumerate(contents):
        rule = _ENTRY if number else _SNAPSHOT
        check_content(path, content, rule, f"This is in line {number + 1}. {_FIX}")
    shards = [
        Shard(shard_name(row[0], rank, row[1]), row[0], *row[2:])
        for line in contents
        for row in line["shards"]
    ]
    gaps = [
        Gap(start, printable(reason), end)
        for line in contents
        for start, reason, end in line["gaps"]
    ]
    first = contents[0]
    if first["rank"] != rank:
        raise _stranger(path, f"files of process {first['rank']}")
    _check_possible(path, shards)
    world_size, numbers = first["world_size"], first["numbers"]
    return Manifest(rank, world_size, tuple(shards), tuple(gaps), numbers)


def read_version_1(path: Path) -> Manifest:
    """Read a manifest of version 1, which each flush has replaced.

    Raises:
        ValueError: it was changed, or lists what is no file of the store.
    """
    content = read_sealed(path, f"restore it, or run hf-sketch repair {path.parent}")
    check_content(path, content, _VERSION_1, _FIX)
    if content["rank"] != rank_of(path.name):
        raise _stranger(path, f"files of process {content['rank']}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        number = Path(shard.file).stem.rpartition("-")[2]
        own = (
            number.isdecimal()
            and len(number) < 16
            and shard.file == shard_name(shard.kind, content["rank"], int(number))
        )
        if not own:
            raise _stranger(path, repr(printable(shard.file)))
    _check_possible(path, shards)
    gaps = tuple(
        Gap(gap["first_step"], printable(gap["reason"]), gap["last_step"])
        for gap in content["gaps"]
    )
    return Manifest(content["rank"], content["world_size"], shards, gaps)


def _check_possible(path: Path, shards: Sequence[Shard]) -> None:
    """Raise if files cannot have what a manifest claims."""
    if len({shard.file for shard in shards}) < len(shards):
        raise _stranger(path, "a file twice")
    for shard in shards:
        inside = shard.head_bytes <= shard.size_bytes
        if shard.first_step > shard.last_step or not inside:
            raise _stranger(path, str(shard))


def _stranger(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} lists {what}, which is no file of this store: get the store from "
        f"somebody you trust, or run hf-sketch repair {path.parent}."
    )
