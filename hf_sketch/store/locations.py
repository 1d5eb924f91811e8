"""Where stores are opened from: a directory, a URL that fsspec reads, or the Hub."""

import re
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem
from huggingface_hub import HfApi, constants, snapshot_download

from hf_sketch.store.contents import card_of
from hf_sketch.store.header import HEADER, NORMALIZER
from hf_sketch.store.log import (
    file_names,
    is_of_manifest,
    manifest_files,
    read_log,
    read_manifests,
    remove_leftovers,
)
from hf_sketch.store.manifest import Manifest

_CARD = "README.md"
_FOLDER = "sketches"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL."""
    return "://" in str(path)


def store_directory(path: str | Path, **options: Any) -> Path:
    """Return the directory of a store, downloading it first if it is elsewhere.

    Args:
        path: a Trainer's `output_dir`, its `sketches` directory, the URL of either, or,
            if no such directory exists, the id of a repository on the Hub.
        options: for `huggingface_hub.snapshot_download`; `repo_type` defaults to
            "dataset", pass "model" for what a Trainer pushed. For a URL, options of
            its file system.
    """
    if is_remote(path):
        return fetch_store(str(path), **options)
    directory = Path(path)
    if (directory / HEADER).exists():
        return directory
    if not directory.exists() and _REPO_ID.fullmatch(str(path)):
        settings: dict[str, Any] = {"repo_type": "dataset", **options}
        settings["allow_patterns"] = [f"{_FOLDER}/*"]
        return Path(snapshot_download(str(path), **settings)) / _FOLDER
    return directory / _FOLDER


def push_store(
    directory: Path | None, repo_id: str, private: bool | None, token: Any
) -> str:
    """Upload a store to a dataset repository, creating it if necessary.

    A repository without a dataset card gets one.

    Returns:
        the commit's address.

    Raises:
        ValueError: there is no store.
    """
    if directory is None:
        raise ValueError(
            "These rows are in memory only. Push those of load_sketches(output_dir), "
            "which have a store."
        )
    api = HfApi(token=token)
    ranks = [manifest.rank for manifest in read_manifests(directory)]
    api.create_repo(repo_id, private=private, repo_type="dataset", exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        path_in_repo=_FOLDER,
        repo_type="dataset",
        commit_message="Upload sketches",
        ignore_patterns=["*.tmp"],
        # What an earlier push has left of these processes; other files stay.
        delete_patterns=[p for r in ranks for p in (f"*-{r:05d}-*", f"*-{r:05d}.*")],
    )
    if not api.file_exists(repo_id, _CARD, repo_type="dataset"):
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=card_of(directory, repo_id).encode(),
            path_in_repo=_CARD,
            repo_type="dataset",
            commit_message="Describe the sketches",
        )
    return commit.commit_url


def fetch_store(url: str, **options: object) -> Path:
    """Bring the local copy of the store at a URL up to date, and return its directory.

    A listed shard never changes, so only new shards are downloaded, for example those
    that a live run has completed since. Copies lie in `HF_HOME`/hf_sketch.

    Args:
        url: a Trainer's `output_dir` or its `sketches` directory.
        options: options of the file system, passed to fsspec.

    Raises:
        ImportError: the package of the file system is not installed.
        FileNotFoundError: there is no store.
    """
    files, root = _root(url, **options)
    key = xxhash.xxh3_128_hexdigest(files.unstrip_protocol(root).encode())
    directory = Path(constants.HF_HOME) / "hf_sketch" / key / _FOLDER
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        _update(files, root, directory)
    return directory


def store_url(url: str) -> str:
    """Return the URL of the directory that has a store's header.

    Raises:
        FileNotFoundError: there is no store.
    """
    files, root = _root(url)
    return files.unstrip_protocol(root)


def _root(url: str, **options: object) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the directory of the store there."""
    files, root = url_to_fs(url, **options)
    places = [root.rstrip("/"), f"{root.rstrip('/')}/{_FOLDER}"]
    root = next((p for p in places if files.isfile(f"{p}/{HEADER}")), None)
    if root is None:
        raise FileNotFoundError(
            f"No sketches at {url}. Pass the URL of the output_dir (or of the "
            "'sketches' directory in it) of a run with GradientSketchCallback."
        )
    return files, root


def _update(files: AbstractFileSystem, root: str, directory: Path) -> None:
    """Download what a copy lacks, manifests before the shards that they list."""
    before = {s.file: s for m in copied_manifests(directory) for s in m.shards}
    found = [str(path) for path in files.glob(f"{root}/manifest-*")]
    manifests = [path for path in found if is_of_manifest(path.rpartition("/")[2])]
    for old in directory.glob("manifest-*"):
        old.unlink()
    normalizers = [str(path) for path in files.glob(f"{root}/{NORMALIZER}")]
    _fetch(files, [f"{root}/{HEADER}", *normalizers, *manifests], directory)
    lacking: list[str] = []
    for manifest in copied_manifests(directory):
        remove_leftovers(directory, manifest)
        for shard in manifest.shards:
            path = directory / shard.file
            if before.get(shard.file, shard) != shard:  # of another run at this URL
                path.unlink(missing_ok=True)
            if not path.is_file() or path.stat().st_size != shard.size_bytes:
                lacking.append(f"{root}/{shard.file}")
    _fetch(files, lacking, directory)


def copied_manifests(directory: Path) -> list[Manifest]:
    """Return what copied manifests list, whichever files the copy has."""
    names = manifest_files(file_names(directory))
    return [read_log(directory / name, frozenset()).manifest for name in names]


def _fetch(files: AbstractFileSystem, paths: list[str], directory: Path) -> None:
    local = [str(directory / path.rpartition("/")[2]) for path in paths]
    settings = {"desc": "Fetching sketches", "unit": "file", "disable": len(paths) < 2}
    progress: Any = TqdmCallback(tqdm_kwargs=settings)
    files.get(paths, local, callback=progress)
