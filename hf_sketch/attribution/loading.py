"""Opening a store of sketches."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.store.header import (
    Manifest,
    missing_ranks,
    read_header,
    read_manifests,
    shards_of,
)
from hf_sketch.store.hub import store_directory
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, features
from hf_sketch.store.shards import Shard, check_shard, contents_are_checked, open_shards


def load_sketches(
    path: str | Path,
    skip_damaged: bool = False,
    verify: bool | None = None,
    **hub_options: Any,
) -> GradientRows:
    """Open the sketches that a GradientSketchCallback left beside the checkpoints.

    The rows are memory-mapped; those at a URL are copied to the local cache first. What
    is missing from the store, because a process died or recording was off, is told in
    a warning.

    Args:
        path: the Trainer's `output_dir`, the `sketches` directory in it, the URL of
            either on a file system of fsspec (s3://, gs://, hf://, ...), or the id of a
            dataset repository on the Hub.
        skip_damaged: leave out files that are missing or damaged, with a warning,
            instead of raising.
        verify: compare every byte with the digests that were written with it; by
            default this is done for stores of up to 1 GiB, and of larger ones only the
            lengths and the heads of the files are compared (`hf-sketch verify` does it
            all).
        hub_options: for `huggingface_hub.snapshot_download`, as `revision`, `token` or
            `repo_type="model"`; of a URL, those of its file system.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a file is damaged, or the header is of another version or map.
    """
    directory = store_directory(path, **hub_options)
    header = read_header(directory)
    manifests = read_manifests(directory)
    _tell_what_is_missing(directory, manifests)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    if verify is None:
        verify = contents_are_checked(shards)
        if not verify:
            warnings.warn(
                f"{directory} holds {sum(s.size_bytes for s in shards) / 2**30:.1f} "
                "GiB, whose numbers are not compared with their digests on opening: "
                "pass verify=True to compare them, False to hear of it no more.",
                stacklevel=2,
            )
    damaged = _damaged(directory, shards, verify, skip_damaged)
    opened: dict[str, Dataset] = {}
    for kind in (PER_EXAMPLE, PER_STEP):
        whole = [s for s in shards_of(manifests, kind) if s.file not in damaged]
        columns = features(kind, header.model_sketch.out_size, header.row_dtype)
        opened[kind] = open_shards(directory, whole, columns)
    return GradientRows(
        header.model_sketch,
        opened[PER_EXAMPLE],
        opened[PER_STEP],
        header.measured_error,
        directory,
    )


def _damaged(
    directory: Path, shards: Sequence[Shard], contents: bool, skip: bool
) -> set[str]:
    """The files that cannot be read, each with a warning; raises unless `skip`."""
    damaged: set[str] = set()
    for shard in shards:
        try:
            check_shard(directory, shard, contents)
        except ValueError as error:
            if not skip:
                raise
            damaged.add(shard.file)
            message = f"{shard.rows} rows left out: {error}"
            warnings.warn(message, stacklevel=3)
    return damaged


def _tell_what_is_missing(directory: Path, manifests: Sequence[Manifest]) -> None:
    """Warn of rows that the store should have."""
    if missing := missing_ranks(manifests):
        warnings.warn(
            f"{directory} has no rows of the processes {missing}: they died before they"
            " wrote any, or their files are on another machine; join them with "
            "hf-sketch merge.",
            stacklevel=3,
        )
    for manifest in manifests:
        for gap in manifest.gaps:
            warnings.warn(f"{directory} has no rows {gap}", stacklevel=3)
