"""Copying a store to a URL, so that readers never see a part of what was added."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from hf_sketch.store.header import HEADER, NORMALIZER, read_header
from hf_sketch.store.locations import copied_manifests
from hf_sketch.store.log import file_names, is_of_manifest
from hf_sketch.store.manifest import Manifest
from hf_sketch.store.shards import Shard


def upload_store(directory: Path, url: str, **options: object) -> list[str]:
    """Add what a store at a URL lacks of one on disk, which a run may still write to.

    Files of rows come first. They count when the manifest that lists them follows, one
    small file per process. An upload that was interrupted is repeated; files that a
    manifest there lists are not sent again. Files of other processes, uploaded from
    other machines, stay.

    Args:
        directory: the store on disk.
        url: the store's directory at the URL, or where it will be.
        options: options of the file system, passed to fsspec.

    Returns:
        the names of the files of rows that were sent.

    Raises:
        FileNotFoundError: there is no store on disk.
        ValueError: the store at the URL is of another run.
    """
    files, root = url_to_fs(url, **options)
    root = root.rstrip("/")
    with TemporaryDirectory(prefix="hf_sketch-") as temporary:
        ours, theirs = Path(temporary, "ours"), Path(temporary, "theirs")
        ours.mkdir()
        theirs.mkdir()
        for name in _small(file_names(directory)):
            shutil.copy(directory / name, ours)
        manifests = copied_manifests(ours)
        listed, there = _shards(manifests), _known(files, root, theirs)
        if there is not None:
            _check_same_run(url, ours, theirs, listed, there)
        sent = [name for name in listed if name not in (there or {})]
        _put(files, directory, sent, root)
        small = file_names(ours)
        # The header is what makes a new store one.
        _put(files, ours, sorted(small, key=lambda name: (name == HEADER, name)), root)
        ranks = {manifest.rank for manifest in manifests}
        gone = (file_names(theirs) - small) | ((there or {}).keys() - listed.keys())
        if gone := [name for name in gone if _rank(name) in ranks]:
            files.rm([f"{root}/{name}" for name in gone])
    return sent


def _known(
    files: AbstractFileSystem, root: str, directory: Path
) -> dict[str, Shard] | None:
    """Fetch the header and the manifests of a URL; None if there is no store."""
    if not files.isfile(f"{root}/{HEADER}"):
        return None
    paths = [str(path) for path in files.ls(root, detail=False)]
    names = _small({path.rpartition("/")[2] for path in paths})
    local = [f"{directory}/{name}" for name in names]
    files.get([f"{root}/{name}" for name in names], local)
    return _shards(copied_manifests(directory))


def _check_same_run(
    url: str,
    ours: Path,
    theirs: Path,
    listed: dict[str, Shard],
    there: dict[str, Shard],
) -> None:
    """Raise if files of one name have other rows there: a run uses no name twice."""
    fits = read_header(ours).fits(read_header(theirs))
    if not fits or any(listed[name] != there[name] for name in listed.keys() & there):
        raise ValueError(
            f"{url} holds the store of another run. Pass a new URL, or remove it."
        )


def _small(names: set[str] | frozenset[str]) -> list[str]:
    """The names of files other than those of rows."""
    return [n for n in names if n in (HEADER, NORMALIZER) or is_of_manifest(n)]


def _rank(name: str) -> int | None:
    """The process of a file of rows or of a manifest; None for the header's files."""
    parts = name.partition(".")[0].split("-")
    return int(parts[1]) if len(parts) > 1 else None


def _shards(manifests: list[Manifest]) -> dict[str, Shard]:
    """All files of rows by name."""
    return {shard.file: shard for m in manifests for shard in m.shards}


def _put(
    files: AbstractFileSystem, directory: Path, names: list[str], root: str
) -> None:
    """Upload files in order, each whole or not at all."""
    settings = {"desc": "Uploading sketches", "unit": "file", "disable": len(names) < 2}
    progress: Any = TqdmCallback(tqdm_kwargs=settings)
    with progress:
        progress.set_size(len(names))
        for name in names:
            files.put_file(str(directory / name), f"{root}/{name}")
            progress.relative_update()
