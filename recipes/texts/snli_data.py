"""SNLI from the Hub or from a file."""

from datasets import Dataset, load_dataset

from hf_sketch.recipes.texts.data_files import (
    check_columns,
    check_labels,
    check_texts,
    read_data_file,
)
from hf_sketch.recipes.texts.snli_sample import LABELS

_NAME = "stanfordnlp/snli"
_NO_GOLD_LABEL = -1


def load_snli(split: str = "train", file: str | None = None) -> Dataset:
    """The pairs with a gold label: premise, hypothesis, label.

    Args:
        split: "train", "validation" or "test" of the Hub's dataset.
        file: with the same columns, instead of it.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: columns are missing, or a label is unknown.
        ConnectionError: the Hub is out of reach.
    """
    rows = load_dataset(_NAME, split=split) if file is None else read_data_file(file)
    source = file or _NAME
    check_texts(rows, ("premise", "hypothesis"), source)
    check_columns(rows, ("label",), source)
    kept = rows.filter(lambda label: label != _NO_GOLD_LABEL, input_columns="label")
    if not len(kept):
        raise ValueError(
            f"{source} must have labels, got {_NO_GOLD_LABEL} in all of its "
            f"{len(rows)} rows, which means none: pass rows with gold labels."
        )
    labels = check_labels(kept, "label", LABELS, source)
    return kept.remove_columns("label").add_column("label", labels)
