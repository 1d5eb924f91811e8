"""Which steps of a run stand out, and which examples made them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.durable import replace_file
from hf_sketch.recipes.options.spikes import SpikesArguments
from hf_sketch.recipes.texts.shown import (
    columns_of_texts,
    read_trained_rows,
    shortened,
    texts_of,
)
from hf_sketch.sketches.choices import check_count

Line = dict[str, Any]


def run_spikes(arguments: SpikesArguments, directories: list[str]) -> list[Line]:
    """Find, print and optionally save; return a line per step and named example.

    Raises:
        ValueError: there is not one store, it lacks rows, or an argument is bad.
        FileNotFoundError: a file or the store is not there.
    """
    if len(directories) != 1:
        raise ValueError(
            f"spikes takes one store, got {len(directories)}. Call it for each run."
        )
    check_count("top_k", arguments.top_k)
    store = load_sketches(directories[0])
    train, texts = None, list[str]()
    if arguments.train_file is not None:
        train = read_trained_rows(store, arguments.train_file)
        texts = texts_of(train, columns_of_texts(train, arguments.text_columns))
    lines: list[Line] = store.find_spikes(
        threshold=arguments.threshold,
        window=arguments.window,
        carried=arguments.carried,
    ).to_list()
    for line in lines:
        if texts and 0 <= line["example_id"] < len(texts):
            line["text"] = texts[line["example_id"]]
    if arguments.output_file is not None:
        _save(Path(arguments.output_file), lines, train)
    _print(lines, len(store.steps or ()), arguments.top_k)
    return lines


def _print(lines: list[Line], recorded: int, top_k: int) -> None:
    """Print each step with its strongest examples."""
    by_step: dict[int, list[Line]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    print(f"{len(by_step)} of {recorded:,} recorded steps stand out.")
    for named in by_step.values():
        first = named[0]
        print(
            f"\nStep {first['step']} (epoch {first['epoch']}): "
            f"loss {_height(first, 'loss')}, gradient norm {_height(first, 'norm')}, "
            f"clip factor {first['clip_factor']:.3g}"
        )
        carried = sum(line["share"] for line in named)
        print(
            f"  {len(named)} of {first['step_examples']} examples carry {carried:.0%} "
            "of its gradient:"
        )
        for line in named[:top_k]:
            again = f"; named in {line['spikes']} spikes" * (line["spikes"] > 1)
            seen = f"seen {line['rows']} times" if line["rows"] > 1 else "seen once"
            print(
                f"    {line['share']:6.1%}  #{line['example_id']:<6} loss "
                f"{line['loss']:.3f}, {seen}{again}  {shortened(line.get('text', ''))}"
            )
        if len(named) > top_k:
            print(f"    and {len(named) - top_k} more")


def _height(line: Line, name: str) -> str:
    """A step's value, and how far it lies above those before it."""
    value, deviation = line[f"step_{name}"], line[f"{name}_deviation"]
    judged = "" if np.isnan(deviation) else f" ({deviation:+.1f} deviations)"
    return f"{value:.4g}{judged}"


def _save(path: Path, lines: list[Line], train: Dataset | None) -> None:
    """Write each named example once, with the row that it was trained as."""
    by_example: dict[int, list[Line]] = {}
    for line in lines:
        by_example.setdefault(line["example_id"], []).append(line)
    records: list[Line] = []
    for example, named in sorted(by_example.items()):
        row = train[example] if train is not None and 0 <= example < len(train) else {}
        found = {
            "example_id": example,
            "share": _greatest(named, "share"),
            "loss": _greatest(named, "loss"),
            "steps": [line["step"] for line in named],
        }
        records.append({**row, **found})
    text = "".join(json.dumps(record, default=str) + "\n" for record in records)
    replace_file(path, text.encode())
    print(f"saved {len(records)} examples to {path}")


def _greatest(named: list[Line], column: str) -> float | None:
    """The greatest number of a column; None if none is finite, as JSON has no NaN."""
    values = [line[column] for line in named if np.isfinite(line[column])]
    return max(values, default=None)
