"""Rows of data files as people have them: an answer, or an error that names the row."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
# An empty cell, "None" or "N/A" is a text like any other; Excel starts with a mark.
_CSV = {"keep_default_na": False, "encoding": "utf-8-sig"}


def read_data_file(path: str) -> Dataset:
    """The rows of a .json, .jsonl, .csv or .txt file, which may be compressed (.gz).

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its name has another ending, it cannot be read, or has no rows.
    """
    reader = check_data_file(path)
    options = _CSV if reader == "csv" else {}
    try:
        return load_dataset(reader, data_files=path, split="train", **options)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        problem = _problem(path, reader) or (
            f"{error.__cause__ or error}. Give all rows the same columns, and each "
            "column values of one kind."
        )
        raise ValueError(f"{path} cannot be read as {reader}: {problem}") from error


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


def count_or_share(option: str, given: str, rows: int, most: int) -> int:
    """Return how many of some rows "2%" or "50" of them are.

    Args:
        option: command-line option, named in the error.
        given: a number, or a share in percent.
        rows: their number.
        most: the largest result allowed; the least is 1.

    Raises:
        ValueError: it is neither, or out of range.
    """
    share = given.endswith("%")
    try:
        value = float(given.removesuffix("%")) if share else int(given)
    except ValueError:
        value = math.nan
    count = round(value * rows / 100) if share and math.isfinite(value) else value
    if not 1 <= count <= most:
        raise ValueError(
            f"{option} must be a share or a number that is 1 to {most} of {rows} rows, "
            f"got {given!r}. Pass e.g. {option} 2%."
        )
    return int(count)


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


def check_texts(dataset: Dataset, columns: Sequence[str], source: str) -> None:
    """Raise unless every row has a text in each of these columns.

    Raises:
        ValueError: a column is missing, or a row has no text in one.
    """
    check_columns(dataset, columns, source)
    for name in columns:
        for number, text in enumerate(dataset[name]):
            if not isinstance(text, str):
                raise ValueError(
                    f"row {number} of {source} must have a text in the column {name!r},"
                    f" got {text!r}: add it, or leave the row out."
                )


def check_labels(
    dataset: Dataset, column: str, names: Sequence[str], source: str
) -> list[int]:
    """Return each row's label as a number; names and whole floats are taken, too.

    Args:
        dataset: the rows.
        column: column of the labels.
        names: names of the labels, by number.
        source: what the rows are from.

    Raises:
        ValueError: a row's label is none of them.
    """
    spoken = getattr(dataset.features[column], "names", None)
    labels: list[int] = []
    for number, given in enumerate(dataset[column]):
        value = spoken[given] if spoken and set(spoken) == set(names) else given
        label = _label(value, names)
        if label is None:
            raise ValueError(
                f"the {column} in row {number} of {source} must be one of "
                f"{[*range(len(names))]} or of {[*names]}, got {given!r}: replace it, "
                "or leave the row out."
            )
        labels.append(label)
    return labels


def _label(value: object, names: Sequence[str]) -> int | None:
    """The number of a label, if there is one."""
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        value = int(value) if value.strip().isdecimal() else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    known = isinstance(value, int) and 0 <= value < len(names)
    return value if known else None


def _problem(path: str, reader: str) -> str | None:
    """What keeps a file from being read, with the line, if something here does."""
    open_file = gzip.open if path.endswith(".gz") else open
    in_lines = path.removesuffix(".gz").endswith(".jsonl")
    rows = 0
    with open_file(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig").strip()
                if in_lines and line:
                    json.dumps(json.loads(line), ensure_ascii=False).encode()
            except UnicodeDecodeError:
                return f"line {number} is not in UTF-8. Save the file in that encoding."
            except UnicodeEncodeError:
                return (
                    f"line {number} has half of an escaped character, which is no text."
                    " Mend it or remove it."
                )
            except json.JSONDecodeError as error:
                return f"line {number} is no JSON ({error}). Mend it or remove it."
            rows += bool(line)
    if rows <= int(reader == "csv"):  # whose first line has the names
        return "it has no rows. Add some."
    return None
