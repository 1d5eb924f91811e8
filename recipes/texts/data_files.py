"""Rows of data files that a recipe is given."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


def read_data_file(path: str) -> Dataset:
    """The rows of a .json, .jsonl, .csv or .txt file, which may be compressed (.gz).

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its name has another ending.
    """
    return load_dataset(check_data_file(path), data_files=path, split="train")


def check_data_file(path: str) -> str:
    """Return the name of a file's reader in `datasets`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its name has another ending.
    """
    file = Path(path)
    ending = file.suffix
    if ending == ".gz":
        ending = Path(file.stem).suffix
    if ending not in _READERS:
        raise ValueError(
            f"a data file must end in one of {tuple(_READERS)}, with .gz or without, "
            f"got {path}: convert it, as with Dataset.to_json."
        )
    if not file.is_file():
        raise FileNotFoundError(f"a data file must be there, got no file at {path}.")
    return _READERS[ending]


def check_columns(dataset: Dataset, columns: Sequence[str], source: str) -> None:
    """Raise unless a dataset has these columns.

    Raises:
        ValueError: it has not.
    """
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{source} must have the columns {list(columns)}, got "
            f"{dataset.column_names} without {missing}: rename its columns."
        )
