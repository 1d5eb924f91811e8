"""Files as people have them: an answer, or an error that names the row."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset

from hf_sketch.recipes.texts.data_files import (
    check_labels,
    check_texts,
    read_data_file,
)
from hf_sketch.recipes.texts.entailment import load_pairs

NAMES = ["no", "maybe", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.jsonl", b"", "it has no rows"),
        ("header.csv", b"text,label\n", "it has no rows"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is no JSON"),
        ("half.jsonl", b'{"text": "x \\ud83d"}\n', "line 1 has half of an escaped"),
        ("excel.csv", "text\na\nCafé\n".encode("cp1252"), "line 3 is not in UTF-8"),
        ("mixed.jsonl", b'{"a": 1}\n3\n', "the same columns"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content))
    for file in (path, packed):
        with pytest.raises(
            ValueError, match=rf"{name}.* cannot be read as .*{problem}"
        ):
            read_data_file(str(file))


def test_cells_of_a_table_are_texts_as_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext,label\nNone,1\nN/A,0\nCafé,2\n".encode())
    rows = read_data_file(str(path))
    assert rows["text"][:] == ["None", "N/A", "Café"]
    assert rows["label"][:] == [1, 0, 2]


@pytest.mark.parametrize(
    "labels", [[2, 0], [2.0, 0.0], ["yes", "no"], ["2", "0"]], ids=str
)
def test_labels_are_taken_as_they_are_spelt(labels):
    rows = Dataset.from_dict({"label": labels})
    assert check_labels(rows, "label", NAMES, "f") == [2, 0]


def test_labels_of_other_numbers_are_matched_by_name():
    rows = Dataset.from_dict({"label": [0, 2]})
    rows = rows.cast_column("label", ClassLabel(names=["yes", "maybe", "no"]))
    assert check_labels(rows, "label", NAMES, "f") == [2, 0]


@pytest.mark.parametrize("label", [-1, 3, 1.5, "perhaps", "", None], ids=repr)
def test_an_unknown_label_is_named_with_its_row(label):
    first = "no" if isinstance(label, str) else 0
    rows = Dataset.from_dict({"label": [first, label]})
    with pytest.raises(
        ValueError, match=r"the label in row 1 of f must be one of \[0, "
    ):
        check_labels(rows, "label", NAMES, "f")


def test_a_missing_text_is_named_with_its_row():
    rows = Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", None]})
    with pytest.raises(
        ValueError, match=r"row 1 of f must have a text in .*hypothesis"
    ):
        check_texts(rows, ["premise", "hypothesis"], "f")


def test_rows_without_a_gold_label_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    pair = {"premise": "a", "hypothesis": "b"}
    rows = [{**pair, "label": label} for label in (1.0, -1, 2.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_pairs("train", str(path))["label"][:] == [1, 2]
    path.write_text(json.dumps({**pair, "label": -1}) + "\n")
    with pytest.raises(ValueError, match=r"got -1 in all of its 1 rows"):
        load_pairs("train", str(path))
