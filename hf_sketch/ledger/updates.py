"""The rows of a ledger, as a store has them."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sketch.store.contents import with_manifests
from hf_sketch.store.header import read_header
from hf_sketch.store.locations import store_directory
from hf_sketch.store.manifest import Manifest, shards_of
from hf_sketch.store.rows import UPDATE
from hf_sketch.store.shards import check_shard, open_shards


def load_updates(path: str | Path, **hub_options: Any) -> Dataset:
    """Open the rows that say what each optimizer step did to the weights.

    `GradientSketchCallback(updates=True)` records them; docs/ledger.md has an example.

    Args:
        path: see `load_sketches`.
        hub_options: see `load_sketches`.

    Returns:
        one row per change of the weights, in their order: `step` (for a change that the
        optimizer did not make, the steps before it), `epoch`, `learning_rate`,
        `by_optimizer`, `finite`, `balance` (docs/format.md) and `sketch` (row_size,),
        the weights after the change minus those before it, sketched by the store's map.
        A run begins with a row without a change. Empty if updates were not recorded.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a file is damaged.
    """
    directory = store_directory(path, **hub_options)
    columns = read_header(directory).features(UPDATE)

    def opened(manifests: list[Manifest]) -> Dataset:
        shards = shards_of(manifests, UPDATE)
        shards.sort(key=lambda shard: (shard.first_step, shard.last_step))
        for shard in shards:
            check_shard(directory, shard, contents=True)
        return open_shards(directory, shards, columns)

    return with_manifests(directory, opened)
