"""Maintaining stores: whether they are whole, repairing, merging."""

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from hf_sketch.durable import new_directory, replace_file
from hf_sketch.store.header import (
    FORMAT_VERSION,
    Header,
    is_current,
    read_header,
    write_header,
)
from hf_sketch.store.lock import locked
from hf_sketch.store.log import (
    file_names,
    manifest_files,
    read_log,
    read_manifests,
    torn_bytes,
    write_log,
)
from hf_sketch.store.manifest import (
    KINDS,
    Gap,
    Manifest,
    missing_ranks,
    rank_of,
)
from hf_sketch.store.opening import create_store
from hf_sketch.store.shards import Shard, check_shard, describe_shard, shard_name

_ASIDE = "damaged"


def find_problems(directory: Path) -> list[str]:
    """Return everything that differs from what was written; empty for a whole store.

    It compares every byte with its checksum, the header's map with its check value, and
    the numbers of rows with the manifests.
    """
    problems: list[str] = []
    manifests: list[Manifest] = []
    try:
        read_header(directory)
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
    names = file_names(directory)
    for path in (directory / name for name in manifest_files(names)):
        try:
            manifests.append(read_log(path, names).manifest)
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += _cut_off(path, manifests[-1], names)
    for shard in tqdm([s for m in manifests for s in m.shards], desc="Verifying"):
        if problem := _problem_of(directory, shard):
            problems.append(problem)
    if not manifests:
        problems.append(f"{directory} has no manifest that can be read.")
    problems += [
        f"{directory} has no files of process {rank}. Join them with hf-sketch merge."
        for rank in missing_ranks(manifests)
    ]
    return problems


def repair(directory: Path) -> list[str]:
    """Make a damaged store open again; nothing is deleted.

    Damaged files are moved to the directory `damaged` in the store, and the manifest
    notes which steps lack rows. A manifest that cannot be read is rebuilt from the
    files of its process.

    Returns:
        what was done.

    Raises:
        ValueError: the header cannot be read, or a run is writing.
    """
    header = read_header(directory)
    with locked(directory):
        return _repair(directory, header)


def _repair(directory: Path, header: Header) -> list[str]:
    done: list[str] = []
    names = file_names(directory)
    for path in (directory / name for name in manifest_files(names)):
        try:
            manifest = read_log(path, names).manifest
        except ValueError:
            manifest = _rebuild_manifest(directory, path)
            _copy_aside(directory, path.name)
            replace_manifest(directory, header, manifest)
            done.append(f"{path.name} was rebuilt from {len(manifest.shards)} files")
        if torn := torn_bytes(path):
            _copy_aside(directory, path.name)
            replace_manifest(directory, header, manifest)
            done.append(f"{torn} bytes of an entry at the end of {path.name} were cut")
        kept: list[Shard] = []
        gaps = list(manifest.gaps)
        for shard in tqdm(manifest.shards, desc="Verifying"):
            problem = _problem_of(directory, shard)
            if problem is None:
                kept.append(shard)
                continue
            _set_aside(directory, shard.file)
            reason = f"{shard.file} was damaged"
            gaps.append(Gap(shard.first_step, reason, shard.last_step))
            done.append(f"{shard.file} with {shard.rows} rows was set aside: {problem}")
        if len(kept) < len(manifest.shards):
            changed = replace(manifest.with_shards(kept), gaps=tuple(gaps))
            replace_manifest(directory, header, changed)
    return done


def upgrade(directory: Path) -> list[str]:
    """Bring a store of an earlier version of the format to the newest one, in place.

    Returns:
        what was done.

    Raises:
        ValueError: the header or a manifest was changed, or a run is writing.
    """
    header, done = read_header(directory), list[str]()
    with locked(directory):
        for path in sorted(directory.glob("manifest-*.json")):
            manifest = read_log(path, frozenset()).manifest
            if path.with_suffix(".jsonl").exists():  # it was cut off before this
                path.unlink()
            else:
                replace_manifest(directory, header, manifest)
            done.append(f"{path} is now of format version {FORMAT_VERSION}")
    return done


def merge(directories: Sequence[Path], output: Path) -> None:
    """Copy stores of one map into a new one, whole or not at all.

    Processes keep their ranks unless two stores share one; then all ranks are numbered
    again.

    Raises:
        ValueError: the stores have different settings or share rows, a file is damaged,
            or the output exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists. Pass the name of a new directory.")
    if len({directory.resolve() for directory in directories}) < len(directories):
        given = [str(directory) for directory in directories]
        raise ValueError(f"{given} name a store twice. Pass different stores.")
    headers = [read_header(directory) for directory in directories]
    for directory, header in zip(directories, headers, strict=True):
        if not header.fits(headers[0]):
            raise ValueError(
                f"{directory} holds rows of {header.settings}, {directories[0]} of "
                f"{headers[0].settings}. Merge only stores with the same settings and "
                "parameters."
            )
    sources = [
        (directory, manifest)
        for directory in directories
        for manifest in read_manifests(directory)
    ]
    _check_apart(sources)
    ranks = [manifest.rank for _, manifest in sources]
    if len(set(ranks)) < len(ranks):
        ranks = list(range(len(sources)))
    world_size = max([len(sources), *(m.world_size for _, m in sources)])
    with new_directory(output) as part:
        create_store(part, headers[0], Manifest(ranks[0]))
        for rank, (directory, manifest) in zip(ranks, sources, strict=True):
            shards = tuple(
                _copy(directory, shard, part, rank)
                for shard in tqdm(manifest.shards, desc=f"Copying {directory}")
            )
            write_log(part, Manifest(rank, world_size, shards, manifest.gaps))


def _cut_off(path: Path, manifest: Manifest, names: Collection[str]) -> Iterator[str]:
    """What a crash, or a cut of the manifest, has left of the latest flush."""
    fix = "Its rows are left out; training that resumes records them again."
    if torn := torn_bytes(path):
        yield f"{path} ends in {torn} bytes of an entry that is not whole. {fix}"
    for kind in KINDS:
        name = shard_name(kind, manifest.rank, manifest.next_number)
        if name in names:
            yield f"{path} does not list {name}. {fix}"


def _problem_of(directory: Path, shard: Shard) -> str | None:
    """Return what is wrong with a shard, if anything."""
    path = directory / shard.file
    try:
        check_shard(directory, shard, contents=True)
        found = describe_shard(path)
    except ValueError as error:
        return str(error)
    if found == shard:
        return None
    return f"{path} holds {found}, the manifest says {shard}."


def _rebuild_manifest(directory: Path, path: Path) -> Manifest:
    """Make a manifest of all files of a process that can be read."""
    rank = rank_of(path.name)
    found: list[Shard] = []
    kept: list[Shard] = []
    for file in sorted(directory.glob(f"*-{rank:05d}-*.arrow")):
        try:
            shard = describe_shard(file)
        except (ValueError, OSError):
            _set_aside(directory, file.name)
            continue
        found.append(shard)
    # A file that was replaced may still be there: later ones have greater numbers, and
    # no two of a manifest have rows of one step.
    for shard in sorted(found, key=lambda shard: -shard.number):
        if any(_overlap(shard, other) for other in kept):
            _set_aside(directory, shard.file)
        else:
            kept.append(shard)
    kept.sort(key=lambda shard: shard.first_step)
    return Manifest(rank, rank + 1, tuple(kept))


def _overlap(shard: Shard, other: Shard) -> bool:
    """Whether two files have rows of one kind and step."""
    apart = shard.last_step < other.first_step or other.last_step < shard.first_step
    return shard.kind == other.kind and not apart


def _set_aside(directory: Path, name: str) -> None:
    """Move a file to the directory of damaged ones, if it is there."""
    aside = directory / _ASIDE
    aside.mkdir(exist_ok=True)
    if (directory / name).exists():
        (directory / name).replace(aside / name)


def _copy_aside(directory: Path, name: str) -> None:
    """Copy a file that will be replaced to the directory of damaged ones."""
    aside = directory / _ASIDE
    aside.mkdir(exist_ok=True)
    shutil.copy2(directory / name, aside / name)


def replace_manifest(directory: Path, header: Header, manifest: Manifest) -> None:
    """Write a manifest, after a header that says which version it has.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    if not is_current(directory):
        write_header(directory, header)
    write_log(directory, manifest)


def _check_apart(sources: Sequence[tuple[Path, Manifest]]) -> None:
    """Raise if two stores hold the same rows."""
    seen: dict[str, Path] = {}
    for directory, manifest in sources:
        for shard in manifest.shards:
            other = seen.setdefault(shard.xxh3_128, directory)
            if other != directory:
                raise ValueError(
                    f"{directory} and {other} hold the same rows ({shard.file}). Pass "
                    "stores of different runs or processes."
                )


def _copy(directory: Path, shard: Shard, output: Path, rank: int) -> Shard:
    """Copy a shard unchanged, under the name of a process."""
    check_shard(directory, shard, contents=True)
    name = shard_name(shard.kind, rank, shard.number)
    replace_file(output / name, (directory / shard.file).read_bytes())
    return replace(shard, file=name)
