"""What each process has written to a store: its files, and the steps that lack rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hf_sketch.durable import printable, read_sealed
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.shards import Shard, shard_name

KINDS: Final = (PER_EXAMPLE, PER_STEP)


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
    try:
        first, *_ = contents
        shards = [_shard(rank, *row) for line in contents for row in line["shards"]]
        gaps = [
            Gap(start, printable(reason), end)
            for line in contents
            for start, reason, end in line["gaps"]
        ]
        if first["rank"] != rank:
            raise ValueError(f"files of process {first['rank']}")
        world_size, numbers = first["world_size"], first["numbers"]
    except (KeyError, TypeError, ValueError) as error:
        raise _stranger(path, str(error)) from None
    return Manifest(rank, world_size, tuple(shards), tuple(gaps), numbers)


def read_version_1(path: Path) -> Manifest:
    """Read a manifest of version 1, which each flush has replaced.

    Raises:
        ValueError: it was changed, or lists what is no file of the store.
    """
    content = read_sealed(path, f"restore it, or run hf-sketch repair {path.parent}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        number = Path(shard.file).stem.rpartition("-")[2]
        own = number.isdecimal() and shard.file == shard_name(
            shard.kind, content["rank"], int(number)
        )
        if shard.kind not in KINDS or not own:
            raise _stranger(path, repr(printable(shard.file)))
    gaps = tuple(
        Gap(gap["first_step"], printable(gap["reason"]), gap["last_step"])
        for gap in content["gaps"]
    )
    return Manifest(content["rank"], content["world_size"], shards, gaps)


def _shard(rank: int, kind: str, number: int, *rest: Any) -> Shard:
    *counts, head_digest, file_digest = rest
    numbers = all(type(x) is int and x >= 0 for x in (number, *counts))
    texts = all(isinstance(x, str) for x in (head_digest, file_digest))
    if kind not in KINDS or not numbers or not texts:
        raise ValueError(printable(repr((kind, number, *rest))))
    return Shard(shard_name(kind, rank, number), kind, *rest)


def _stranger(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} lists {what}, which is no file of this store: get the store from "
        f"somebody you trust, or run hf-sketch repair {path.parent}."
    )
