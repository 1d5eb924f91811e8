"""What is in a store, in words and as values."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.header import read_header
from hf_sketch.store.log import read_manifests
from hf_sketch.store.manifest import KINDS, Manifest, missing_ranks, shards_of
from hf_sketch.store.rows import UPDATE

T = TypeVar("T")
_CARD = """---
library_name: hf_sketch
tags:
- hf-sketch
- training-data-attribution
- gradients
---

# Gradient sketches of a training run

Each row is a sketch of a gradient: {out_size:,} numbers, a seeded random projection
that nearly keeps inner products. {rows}. They cover {elements:,} trainable
parameters (layout {layout}, operator {operator}, seed {seed}).

Measured error: {error}.

```python
from hf_sketch import load_sketches, sketch_dataset

store = load_sketches("{repo_id}")
queries = sketch_dataset(model, data, store.model_sketch, processing_class=tokenizer)
store.attribute(queries, top_k=10)  # the training examples behind these queries
```
`model` is the model that was trained, `data` what you ask about. Texts of the training
set are not in here; row `example_id` is their number in it.

Sketches are made of gradients, from which parts of the training data may be
reconstructed. Share them as you would share the data.
"""
_OF_SKETCH = ("out_size", "layout", "operator", "seed")
_OF_HEADER = ("loss", "row_dtype", "unverified", "unowned", "train_rows")


def with_manifests(directory: Path, read: Callable[[list[Manifest]], T]) -> T:
    """Return what a function makes of a store's manifests.

    It is called again if a file is gone since the run that writes has joined it with
    others.

    Raises:
        ValueError: a manifest or a file that it lists was changed.
    """
    manifests = read_manifests(directory)
    while True:
        try:
            return read(manifests)
        except (ValueError, FileNotFoundError):
            before, manifests = manifests, read_manifests(directory)
            if listed_files(before) <= listed_files(manifests):
                raise


def listed_files(manifests: Sequence[Manifest]) -> set[str]:
    """Return the names of all files that manifests list."""
    return {shard.file for manifest in manifests for shard in manifest.shards}


def describe(directory: Path) -> str:
    """Return what is in a store, in some lines.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: its header or a manifest was changed.
    """
    header, manifests = read_header(directory), read_manifests(directory)
    coverage = header.model_sketch.coverage()
    lines = [
        str(directory),
        f"  {header.settings}",
        f"  covers {len(coverage.parameters)} parameters, {coverage.elements:,} "
        f"elements; {len(coverage.frozen)} frozen parameters are left out",
    ]
    lines += _groups(header.model_sketch)
    for kind, held in _shards(manifests).items():
        steps = f"{held['first_step']} to {held['last_step']}"
        lines.append(
            f"  {kind}: {held['rows']:,} rows in {held['files']} files, "
            f"{held['size_bytes'] / 2**20:.1f} MiB; "
            f"steps {steps if held['files'] else 'none'}"
        )
    lines.append(f"  measured error: {header.measured_error or 'not measured'}")
    if header.unverified is not None:
        lines.append(f"  not compared with single examples: {header.unverified}")
    if header.unowned:
        lines.append(
            f"  left out of rows of examples: {header.unowned:.2g} of the norm of the "
            "first step's gradient, which no example owns"
        )
    for manifest in manifests:
        lines.append(
            f"  process {manifest.rank} of {manifest.world_size}: "
            f"up to step {manifest.last_step}"
        )
        lines += [f"    no rows {gap}" for gap in manifest.gaps]
    lines += [f"  no files of process {rank}" for rank in missing_ranks(manifests)]
    return "\n".join(lines)


def card_of(directory: Path, repo_id: str) -> str:
    """Return the dataset card of a store: what its rows are and how to load them.

    Args:
        directory: the store.
        repo_id: its repository on the Hub.
    """
    held = inventory(directory)
    names = {"per_example": "single examples", "per_step": "steps", UPDATE: "updates"}
    kinds = [
        f"{held[kind]['rows']:,} are of {name}"
        for kind, name in names.items()
        if kind in held and held[kind]["rows"]
    ]
    error = read_header(directory).measured_error or "not measured"
    rows = ", ".join(kinds) or "There are none yet"
    return _CARD.format(**{**held, "rows": rows, "error": error, "repo_id": repo_id})


def inventory(directory: Path) -> dict[str, Any]:
    """Return what is in a store, as JSON-ready values.

    Returns:
        what `describe` says: directory, out_size, layout, operator, seed, groups, loss,
        row_dtype, the numbers of parameters, elements and frozen parameters, rows,
        files, size_bytes, first_step and last_step of per_example, of per_step and, if
        there are any, of update, measured_error, unverified, unowned, train_rows,
        processes and missing_ranks.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: its header or a manifest was changed.
    """
    header, manifests = read_header(directory), read_manifests(directory)
    sketch, error = header.model_sketch, header.measured_error
    coverage = sketch.coverage()
    return {
        "directory": str(directory),
        **{name: getattr(sketch, name) for name in _OF_SKETCH},
        "groups": list(dict.fromkeys(sketch.groups)),
        **{name: getattr(header, name) for name in _OF_HEADER},
        "parameters": len(coverage.parameters),
        "elements": coverage.elements,
        "frozen": len(coverage.frozen),
        **_shards(manifests),
        "measured_error": error and asdict(error),
        "processes": [
            {
                "rank": manifest.rank,
                "last_step": manifest.last_step,
                "gaps": [asdict(gap) for gap in manifest.gaps],
            }
            for manifest in manifests
        ],
        "missing_ranks": missing_ranks(manifests),
    }


def _groups(sketch: ModelSketch) -> Iterator[str]:
    """What each group of layers covers; nothing without groups."""
    for group in dict.fromkeys(sketch.groups):
        shapes = [
            x for name, x in sketch.shapes if sketch.layer_groups.of[name] == group
        ]
        elements = sum(map(math.prod, shapes))
        yield f"  group {group}: {len(shapes)} parameters, {elements:,} elements"


def _shards(manifests: Sequence[Manifest]) -> dict[str, dict[str, Any]]:
    """What there is of each kind of rows."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        mine = shards_of(manifests, kind)
        if kind == UPDATE and not mine:
            continue
        found[kind] = {
            "rows": sum(shard.rows for shard in mine),
            "files": len(mine),
            "size_bytes": sum(shard.size_bytes for shard in mine),
            "first_step": min((shard.first_step for shard in mine), default=None),
            "last_step": max((shard.last_step for shard in mine), default=None),
        }
    return found
