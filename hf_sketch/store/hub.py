"""Stores on the Hugging Face Hub, and where else they are opened from."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from hf_sketch.store.header import HEADER
from hf_sketch.store.remote import fetch_store, is_remote

_FOLDER = "sketches"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def store_directory(path: str | Path, **options: Any) -> Path:
    """The store at a path, in its `sketches` directory, at a URL or on the Hub.

    Args:
        path: a Trainer's `output_dir`, its `sketches` directory, the URL of either, or,
            where no such directory is there, the id of a repository.
        options: for `huggingface_hub.snapshot_download`; `repo_type` is "dataset" by
            default, and "model" for what a Trainer pushed. Of a URL: those of the file
            system.
    """
    if is_remote(path):
        return fetch_store(str(path), **options)
    directory = Path(path)
    if (directory / HEADER).exists():
        return directory
    if not directory.exists() and _REPO_ID.fullmatch(str(path)):
        patterns = [f"{_FOLDER}/*"]
        settings: dict[str, Any] = {"repo_type": "dataset", **options}
        settings["allow_patterns"] = patterns
        return Path(snapshot_download(str(path), **settings)) / _FOLDER
    return directory / _FOLDER


def push_store(directory: Path, repo_id: str, private: bool | None, token: Any) -> str:
    """Upload a store to a dataset repository, which is made if need be.

    Returns:
        the commit's address.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, repo_type="dataset", exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        path_in_repo=_FOLDER,
        repo_type="dataset",
        commit_message="Upload sketches",
        ignore_patterns=["*.tmp"],
    )
    return commit.commit_url
