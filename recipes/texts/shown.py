"""Training rows as commands show them."""

from collections.abc import Sequence

from datasets import Dataset

from hf_sketch import GradientRows
from hf_sketch.durable import printable
from hf_sketch.recipes.texts.data_files import check_texts, read_data_file
from hf_sketch.store.header import read_header


def read_trained_rows(store: GradientRows, path: str) -> Dataset:
    """The rows of a file that a store's run was trained on.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it cannot be read, or has other rows than the store's ids count.
    """
    dataset = read_data_file(path)
    check_trained_rows(store, dataset, path)
    return dataset


def check_trained_rows(store: GradientRows, dataset: Dataset, path: str) -> None:
    """Raise ValueError if a file's rows are not those that a store's run trained on.

    Args:
        store: the run's rows.
        dataset: the file's.
        path: path of the file, for the message.
    """
    rows = store.directory and read_header(store.directory).train_rows
    if rows not in (None, len(dataset)):
        raise ValueError(
            f"{path} has {len(dataset)} rows, and the run was trained on {rows}: pass "
            "these rows, in their order, as after any filtering."
        )


def columns_of_texts(dataset: Dataset, given: str | None = None) -> list[str]:
    """The columns that hold a dataset's texts.

    Args:
        dataset: the rows.
        given: names, comma-separated; by default all columns of texts but labels.

    Raises:
        ValueError: there are none, or a row has no text in one that was given.
    """
    if given is None:
        features = dataset.features.items()
        kinds = {name: getattr(feature, "dtype", None) for name, feature in features}
        names = [name for name in kinds if kinds[name] in ("string", "large_string")]
        names = [name for name in names if name not in ("label", "labels")]
    else:
        names = given.split(",")
        check_texts(dataset, names, "the training rows")
    if not names:
        raise ValueError(
            f"The training rows have no column of texts among {dataset.column_names}. "
            "Name those to show with --text_columns."
        )
    return names


def texts_of(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """Each row on one line, with its label if it has one."""
    parts = [dataset[name][:] for name in columns]
    texts = [" ⇒ ".join(map(str, row)) for row in zip(*parts, strict=True)]
    if "label" not in dataset.column_names:
        return texts
    names = getattr(dataset.features["label"], "names", None)
    labels = [names[i] if names else i for i in dataset["label"][:]]
    return [f"[{lab}] {text}" for lab, text in zip(labels, texts, strict=True)]


def shortened(text: str, length: int = 120) -> str:
    """A text as it fits on a line of a terminal."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"
