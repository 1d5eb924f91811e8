"""Opening a store of sketches."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.store.contents import listed_files, with_manifests
from hf_sketch.store.header import Header, read_header
from hf_sketch.store.locations import store_directory
from hf_sketch.store.log import read_manifests
from hf_sketch.store.manifest import Manifest, missing_ranks, shards_of
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.shards import Shard, check_shard, open_shards

_VERIFIED_BYTES = 2**30


def load_sketches(
    path: str | Path,
    skip_damaged: bool = False,
    verify: bool | None = None,
    **hub_options: Any,
) -> GradientRows:
    """Open the sketches that a GradientSketchCallback left beside the checkpoints.

    The rows are memory-mapped; those at a URL are copied to the local cache first. A
    warning names rows that are missing because a process died or recording stopped.

    Args:
        path: the Trainer's `output_dir`, the `sketches` directory in it, the URL of
            either on a file system of fsspec (s3://, gs://, hf://, ...), or the id of a
            dataset repository on the Hub.
        skip_damaged: leave out files that are missing or damaged, with a warning,
            instead of raising.
        verify: compare every byte with its checksum. By default this is done for stores
            of up to 1 GiB; in larger ones, only the lengths and the heads of the files
            are compared (`hf-sketch verify` compares everything).
        hub_options: for `huggingface_hub.snapshot_download`, such as `revision`,
            `token` or `repo_type="model"`; for a URL, those of its file system.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a file is damaged, or the header has an unknown version or another
            map.
    """
    directory = store_directory(path, **hub_options)
    header = read_header(directory)
    manifests = read_manifests(directory)
    _warn_of_missing_rows(directory, manifests)
    if verify is None:
        size = sum(shard.size_bytes for m in manifests for shard in m.shards)
        verify = size <= _VERIFIED_BYTES
        if not verify:
            warnings.warn(
                f"Skipping the checksums of {directory}: it holds more than 1 GiB. "
                "verify=True compares them, verify=False silences this warning.",
                stacklevel=2,
            )
    examples, steps = with_manifests(
        directory,
        lambda listed: _opened(directory, header, listed, verify, skip_damaged),
    )
    return GradientRows(
        header.model_sketch, examples, steps, header.measured_error, directory
    )


def _opened(
    directory: Path,
    header: Header,
    manifests: Sequence[Manifest],
    verify: bool,
    skip_damaged: bool,
) -> tuple[Dataset, Dataset]:
    """Return the rows of examples and of steps."""
    shards = [shard for manifest in manifests for shard in manifest.shards]
    damaged = _damaged(directory, shards, verify, skip_damaged)
    examples, steps = (
        open_shards(
            directory,
            [s for s in shards_of(manifests, kind) if s.file not in damaged],
            header.features(kind),
        )
        for kind in (PER_EXAMPLE, PER_STEP)
    )
    return examples, steps


def _damaged(
    directory: Path, shards: Sequence[Shard], contents: bool, skip: bool
) -> set[str]:
    """Return the files that cannot be read, warning of each; raise unless `skip`."""
    damaged: set[str] = set()
    for shard in shards:
        try:
            check_shard(directory, shard, contents)
        except ValueError as error:
            if not skip or shard.file not in listed_files(read_manifests(directory)):
                raise
            damaged.add(shard.file)
            warnings.warn(f"Left out {shard.rows} rows. {error}", stacklevel=3)
    return damaged


def _warn_of_missing_rows(directory: Path, manifests: Sequence[Manifest]) -> None:
    if missing := missing_ranks(manifests):
        warnings.warn(
            f"{directory} has no rows of the processes {missing}: they died before they"
            " wrote any, or their files are on another machine. Join them with "
            "hf-sketch merge.",
            stacklevel=3,
        )
    for manifest in manifests:
        for gap in manifest.gaps:
            warnings.warn(f"{directory} has no rows {gap}", stacklevel=3)
