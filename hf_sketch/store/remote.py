"""Stores on the file systems of fsspec, as s3:// and gs://: a copy to read from."""

from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem
from huggingface_hub import constants

from hf_sketch.store.header import HEADER, read_manifests
from hf_sketch.store.shards import Shard

_FOLDER = "sketches"


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def fetch_store(url: str, **options: object) -> Path:
    """A copy of the store at a URL in the local cache, brought up to date.

    What manifests list does not change, so that only shards which are not there yet are
    fetched: those that a live run has completed since, for one. The cache is
    `HF_HOME`/hf_sketch.

    Args:
        url: of a Trainer's `output_dir` or its `sketches` directory.
        options: of the file system, as fsspec takes them.

    Raises:
        ImportError: the package of the file system is not installed.
        FileNotFoundError: there is no store.
    """
    files, root = url_to_fs(url, **options)
    places = [root.rstrip("/"), f"{root.rstrip('/')}/{_FOLDER}"]
    root = next((p for p in places if files.isfile(f"{p}/{HEADER}")), None)
    if root is None:
        raise FileNotFoundError(
            f"no sketches at {url}: give the URL of a Trainer's output_dir, or of its "
            "'sketches' directory, of a run with GradientSketchCallback."
        )
    key = xxhash.xxh3_128_hexdigest(files.unstrip_protocol(root).encode())
    directory = Path(constants.HF_HOME) / "hf_sketch" / key / _FOLDER
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        _update(files, root, directory)
    return directory


def _update(files: AbstractFileSystem, root: str, directory: Path) -> None:
    """Fetch what a copy lacks, manifests before the shards that they list."""
    before = {shard.file: shard for shard in _shards(directory)}
    manifests = [str(path) for path in files.glob(f"{root}/manifest-*.json")]
    for old in directory.glob("manifest-*.json"):
        old.unlink()
    _fetch(files, [f"{root}/{HEADER}", *manifests], directory)
    lacking: list[str] = []
    for shard in _shards(directory):
        path = directory / shard.file
        if before.get(shard.file, shard) != shard:  # of another run at the same URL
            path.unlink(missing_ok=True)
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            lacking.append(f"{root}/{shard.file}")
    _fetch(files, lacking, directory)


def _shards(directory: Path) -> list[Shard]:
    """What the manifests list."""
    return [s for manifest in read_manifests(directory) for s in manifest.shards]


def _fetch(files: AbstractFileSystem, paths: list[str], directory: Path) -> None:
    local = [str(directory / path.rpartition("/")[2]) for path in paths]
    settings = {"desc": "Fetching sketches", "unit": "file", "disable": len(paths) < 2}
    progress: Any = TqdmCallback(tqdm_kwargs=settings)
    files.get(paths, local, callback=progress)
