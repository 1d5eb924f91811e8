"""What each process has written to a store: its files, and the steps that lack rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from hf_sketch.durable import printable, read_sealed, write_sealed
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.shards import Shard, shard_name

_FULL: Final = ".full"


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
        """The greatest step that has a row; 0 for none."""
        return max((shard.last_step for shard in self.shards), default=0)

    @property
    def next_number(self) -> int:
        """The running number of its next file."""
        return 1 + max((shard.number for shard in self.shards), default=0)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a process's manifest in one step: readers see the old or the new one."""
    path = directory / manifest.file
    write_sealed(path, asdict(manifest))
    path.with_suffix(_FULL).unlink(missing_ok=True)


def mark_full(directory: Path, manifest: Manifest) -> None:
    """Note that rows after a manifest's are missing, where it cannot be replaced.

    The note is an empty file: a full disk has room for a name, but for no byte.

    Raises:
        OSError: there is no room for that either.
    """
    (directory / manifest.file).with_suffix(_FULL).touch()


def manifest_paths(directory: Path) -> list[Path]:
    """Return the manifest files of a store, by rank."""
    return sorted(directory.glob("manifest-*.json"))


def read_manifest(path: Path) -> Manifest:
    """Read one process's manifest.

    Raises:
        ValueError: the file was changed, or lists files outside of the store.
    """
    content = read_sealed(path, f"restore it, or run hf-sketch repair {path.parent}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        _check_name(path, shard, content["rank"])
    gaps = tuple(
        Gap(gap["first_step"], printable(gap["reason"]), gap["last_step"])
        for gap in content["gaps"]
    )
    manifest = Manifest(content["rank"], content["world_size"], shards, gaps)
    if path.with_suffix(_FULL).exists():
        gap = Gap(manifest.last_step + 1, "the disk was full")
        manifest = replace(manifest, gaps=(*gaps, gap))
    return manifest


def _check_name(path: Path, shard: Shard, rank: int) -> None:
    """Raise unless a shard has the name that its process gives, in the same folder."""
    number = Path(shard.file).stem.rpartition("-")[2]
    own = number.isdecimal() and shard_name(shard.kind, rank, int(number)) == shard.file
    if shard.kind not in (PER_EXAMPLE, PER_STEP) or not own:
        raise ValueError(
            f"{path} lists {printable(shard.file)!r}, which is no file of this store: "
            "get the store from somebody you trust, or run hf-sketch repair "
            f"{path.parent}."
        )


def read_manifests(directory: Path) -> list[Manifest]:
    """Read the manifests of all processes that have one, by rank.

    Raises:
        ValueError: one was changed.
    """
    return [read_manifest(path) for path in manifest_paths(directory)]


def missing_ranks(manifests: Sequence[Manifest]) -> list[int]:
    """Return the ranks that took part and left no manifest."""
    there = {manifest.rank for manifest in manifests}
    count = max((manifest.world_size for manifest in manifests), default=1)
    return [rank for rank in range(count) if rank not in there]


def shards_of(manifests: Sequence[Manifest], kind: str) -> list[Shard]:
    """Return all shards of a kind, by step, then by rank."""
    shards = [s for m in manifests for s in m.shards if s.kind == kind]
    return sorted(shards, key=lambda shard: shard.first_step)
