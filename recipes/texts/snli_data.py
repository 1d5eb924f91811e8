"""SNLI from the Hub or from a file."""

from datasets import Dataset, load_dataset

from hf_sketch.recipes.texts.data_files import check_columns, read_data_file
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
    check_columns(rows, ("premise", "hypothesis", "label"), source)
    known = (_NO_GOLD_LABEL, *range(len(LABELS)))
    unknown = [label for label in rows.unique("label") if label not in known]
    if unknown:
        raise ValueError(
            f"labels in {source} must be 0, 1, 2 for {', '.join(LABELS)}, or "
            f"{_NO_GOLD_LABEL} for none, got {unknown[:5]}: replace them by these."
        )
    return rows.filter(lambda label: label != _NO_GOLD_LABEL, input_columns="label")
