"""Ledgers that somebody altered, with checksums that fit again."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from hf_sketch.store.log import read_manifests, write_log
from hf_sketch.store.manifest import shards_of
from hf_sketch.store.rows import UPDATE
from hf_sketch.store.shards import read_shard, write_shard

Deed = Literal["altered", "scaled", "one_number", "dropped", "repeated", "inserted"]
DEEDS: tuple[Deed, ...] = get_args(Deed)


@dataclass(frozen=True)
class Alteration:
    """What is done to one row of a ledger.

    Args:
        deed: "altered" adds noise to a row, "scaled" multiplies it, "one_number"
            changes one of its numbers, "dropped" leaves it out, "repeated" has it
            twice, "inserted" adds another step's row behind it.
        place: the row.
        size: size of the change of an altered row, in units of its norm.
        renumbered: count the steps again, so that their numbers show no gap.
        seed: seed of the noise.
    """

    deed: Deed
    place: int
    size: float = 0.1
    renumbered: bool = False
    seed: int = 0


def altered_store(directory: Path, output: Path, alteration: Alteration) -> Path:
    """Copy a store with one row of its ledger altered, all in one file.

    Returns:
        the copy.
    """
    sketches = output / "sketches"
    shutil.rmtree(output, ignore_errors=True)
    sketches.mkdir(parents=True)
    shutil.copy(directory / "sketches" / "header.json", sketches)
    (manifest,) = read_manifests(directory / "sketches")
    shards = shards_of([manifest], UPDATE)
    tables = [read_shard(directory / "sketches", shard) for shard in shards]
    table = _altered(pa.concat_tables(tables).combine_chunks(), alteration)
    shard = write_shard(sketches, UPDATE, 0, manifest.next_number, table)
    write_log(sketches, manifest.with_shards([shard]))
    return output


def _altered(table: pa.Table, alteration: Alteration) -> pa.Table:
    """The rows with one altered."""
    place, rows = alteration.place, list(range(table.num_rows))
    if alteration.deed == "dropped":
        rows.remove(place)
    elif alteration.deed in ("repeated", "inserted"):
        rows.insert(place + 1, place)
    table = table.take(pa.array(rows))
    if alteration.deed == "inserted":
        steps = np.flatnonzero(table["by_optimizer"].to_numpy(zero_copy_only=False))
        other = steps[(steps > place + 1).argmax()]  # the next one, or the first
        table = _with_sketch(table, place + 1, _sketch(table, int(other)))
    elif alteration.deed not in ("dropped", "repeated"):
        table = _with_sketch(table, place, _changed(_sketch(table, place), alteration))
    return _renumbered(table) if alteration.renumbered else table


def _changed(sketch: Any, alteration: Alteration) -> Any:
    """A sketch that differs by a part of its norm."""
    size = alteration.size
    if alteration.deed == "scaled":
        return sketch * np.float32(1 + size)
    random = np.random.default_rng(alteration.seed)
    noise = random.standard_normal(len(sketch))
    if alteration.deed == "one_number":
        noise *= np.arange(len(sketch)) == random.integers(len(sketch))
    noise *= size * np.linalg.norm(sketch) / np.linalg.norm(noise)
    return (sketch + noise).astype(np.float32)


def _sketch(table: pa.Table, place: int) -> Any:
    return np.array(table["sketch"][place].values)


def _with_sketch(table: pa.Table, place: int, sketch: Any) -> pa.Table:
    """The rows with another sketch in one of them."""
    column = table["sketch"].combine_chunks()
    numbers = column.flatten().to_numpy(zero_copy_only=False).copy()
    width = column.type.list_size
    numbers[place * width : (place + 1) * width] = sketch
    return _replaced(table, "sketch", pa.FixedSizeListArray.from_arrays(numbers, width))


def _renumbered(table: pa.Table) -> pa.Table:
    """The rows with steps that rise by one with each step of the optimizer."""
    steps = table["step"].to_numpy()
    own = table["by_optimizer"].to_numpy(zero_copy_only=False)
    numbers = steps[0] + np.cumsum(own)
    return _replaced(table, "step", pa.array(numbers.astype(np.int32)))


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), column)
