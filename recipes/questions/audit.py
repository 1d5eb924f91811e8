"""Which training examples of a run may have wrong labels, and which are duplicates."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sketch import GradientRows, load_sketches
from hf_sketch.attribution.questions.mislabeled import FILE
from hf_sketch.durable import replace_file
from hf_sketch.recipes.options.audit import AuditArguments
from hf_sketch.recipes.texts.data_files import count_or_share
from hf_sketch.recipes.texts.shown import (
    columns_of_texts,
    read_trained_rows,
    shortened,
    texts_of,
)
from hf_sketch.sketches.choices import check_count
from hf_sketch.store.locations import is_remote, store_directory

Line = dict[str, Any]


def run_audit(arguments: AuditArguments, directories: list[str]) -> list[Line]:
    """Look, print and save; return a line per example, the most suspicious first.

    Raises:
        ValueError: there is not one store, or an argument is bad.
        FileNotFoundError: a file or the store is not there.
    """
    if len(directories) != 1:
        raise ValueError(
            f"audit takes one store, got {len(directories)}. Call it for each run."
        )
    check_count("top_k", arguments.top_k)
    _check_outputs(arguments)
    store = load_sketches(directories[0])
    train = read_trained_rows(store, arguments.train_file)
    dropped = 0
    if arguments.drop is not None:
        dropped = count_or_share("--drop", arguments.drop, len(train), len(train) - 1)
    columns = columns_of_texts(train, arguments.text_columns)
    texts = texts_of(train, [name for name in columns if name != "source"])
    pairs: list[Line] = store.find_duplicates(arguments.threshold).to_list()
    lines = example_lines(store, train, texts, pairs)
    print_audit(lines, pairs, texts, arguments.top_k)
    path = Path(arguments.output_dir or _beside(directories[0])) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"\nsaved {path}")
    if arguments.output_file is not None:
        worst = {line["example_id"] for line in lines[:dropped]}
        _write_without(train, worst, arguments.output_file)
    return lines


def example_lines(
    store: GradientRows, train: Dataset, texts: Sequence[str], pairs: Sequence[Line]
) -> list[Line]:
    """Return what audit.jsonl has of each example, the most suspicious first.

    Raises:
        ValueError: an example is not in the training rows.
    """
    copies: dict[int, list[Line]] = {}
    for pair in pairs:
        ids = pair["example_id"], pair["other_id"]
        for own, other in (ids, ids[::-1]):
            copy = {"example_id": other, "cosine": pair["cosine"]}
            copies.setdefault(own, []).append(copy)
    shown = {"text": list(texts)}
    if "source" in train.column_names:
        shown["source"] = train["source"][:]
    lines: list[Line] = store.find_mislabeled(Dataset.from_dict(shown)).to_list()
    for line in lines:
        line["duplicates"] = copies.get(line["example_id"], [])
        line["why"] = _why(line)
        line["losses"] = [_finite(loss) for loss in line["losses"]]
        for name in ("suspicion", "excess_loss", "disagreement", "gradient_norm"):
            line[name] = _finite(line[name])
    return lines


def print_audit(
    lines: Sequence[Line], pairs: Sequence[Line], texts: Sequence[str], top_k: int
) -> None:
    """Print one page: the worst examples, duplicates, and sources."""
    print(f"{len(lines):,} examples. The most suspicious of a wrong label:")
    for line in lines[:top_k]:
        losses = ", ".join(_shown(loss, ".2f") for loss in line["losses"])
        norm = _shown(line["gradient_norm"], ".3g")
        print(f"\n  #{line['example_id']}  {shortened(line['text'])}")
        print(f"    suspicion {line['suspicion']:+.1f}: {line['why']}")
        print(f"    loss by epoch {losses}; gradient norm {norm}")
    print(f"\n{len(pairs):,} pairs of duplicates{':' if pairs else '.'}")
    for pair in pairs[:top_k]:
        print(f"  cosine {pair['cosine']:.3f}")
        for number in (pair["example_id"], pair["other_id"]):
            print(f"    #{number}  {shortened(texts[number])}")
    if lines and "source" in lines[0]:
        _print_sources(lines)


def _print_sources(lines: Sequence[Line]) -> None:
    """Print each source's examples and their mean suspicion, the worst first."""
    by_source: dict[str, list[float]] = {}
    for line in lines:
        by_source.setdefault(str(line["source"]), []).append(line["suspicion"])
    means = {name: sum(some) / len(some) for name, some in by_source.items()}
    print("\nMean suspicion by source:")
    for name in sorted(means, key=lambda name: -means[name]):
        count = len(by_source[name])
        print(f"  {means[name]:+.2f}  {count:,} examples  {shortened(name)}")


def _why(line: Line) -> str:
    """The parts of suspicion in words, in standard deviations."""
    parts = [f"disagreement with the others {line['disagreement']:+.1f}"]
    if math.isfinite(line["excess_loss"]):
        parts.insert(0, f"loss above its epoch's mean {line['excess_loss']:+.1f}")
    if line["duplicates"]:
        ids = ", ".join(f"#{copy['example_id']}" for copy in line["duplicates"][:3])
        parts.append(f"duplicate of {ids}")
    return ", ".join(parts)


def _shown(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)


def _finite(value: float) -> float | None:
    """The number, or None: JSON has no NaN."""
    return value if math.isfinite(value) else None


def _check_outputs(arguments: AuditArguments) -> None:
    """Raise unless --drop and --output_file come together, to a new place."""
    file = arguments.output_file
    if (file is None) != (arguments.drop is None):
        raise ValueError(
            "--drop and --output_file go together. Pass e.g. --drop 2% --output_file "
            "clean.jsonl."
        )
    if file is not None and (not file.endswith(".jsonl") or Path(file).exists()):
        raise ValueError(
            f"--output_file must be a new file that ends in .jsonl, got {file}. Pass "
            "another name."
        )


def _beside(directory: str) -> Path:
    """Where audit.jsonl goes by default."""
    return Path() if is_remote(directory) else store_directory(directory).parent


def _write_without(train: Dataset, dropped: set[int], file: str) -> None:
    """Write the training rows but for some, and say how to train on them."""
    kept = [number for number in range(len(train)) if number not in dropped]
    rows = (json.dumps(train[number], default=str) + "\n" for number in kept)
    replace_file(Path(file), "".join(rows).encode())
    print(
        f"saved {len(kept):,} rows without the {len(dropped):,} most suspicious. Run "
        "your training again in another output_dir with\n"
        f'  train_dataset=load_dataset("json", data_files={file!r}, split="train")'
    )
