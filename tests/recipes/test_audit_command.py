"""The command that audits a run's training rows, on a trained classifier."""

import json
import math

import pytest
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.cli import console, main
from hf_sketch.recipes.texts.data_files import count_or_share
from tests.helpers.trained.text_classifier import ROWS, trained_classifier

SOURCES = ["web", "book\x1b[31m"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier's run of two epochs, and a training file with sources."""
    directory = trained_classifier(tmp_path_factory.mktemp("classifier"), 256)
    rows = [{**row, "source": SOURCES[i % 2]} for i, row in enumerate(ROWS)]
    Dataset.from_list(rows).to_json(directory / "sources.jsonl")
    return directory


def audit(directory, *options, file="sources.jsonl"):
    train = [] if file is None else [f"--train_file={directory / file}"]
    main(["audit", str(directory / "out"), *train, *options])
    return directory / "out" / "audit.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_page_and_its_file_have_what_the_library_finds(classifier, capsys):
    path = audit(classifier, "--top_k=2", "--threshold=0.2")
    printed = capsys.readouterr().out
    store = load_sketches(classifier / "out")
    suspects = store.find_mislabeled().to_list()
    pairs = store.find_duplicates(threshold=0.2).to_list()
    lines = lines_of(path)
    assert len(lines) == len(ROWS)
    for line, found in zip(lines, suspects, strict=True):
        number = line["example_id"]
        same = {name: line[name] for name in found}
        assert same == found
        assert line["text"].startswith(f"[{ROWS[number]['label']}] ")
        assert ROWS[number]["hypothesis"] in line["text"]
        assert line["source"] == SOURCES[number % 2]
        assert f"mean {found['excess_loss']:+.1f}" in line["why"]
        assert f"others {found['disagreement']:+.1f}" in line["why"]
        copies = [
            pair["other_id"] + pair["example_id"] - number
            for pair in pairs
            if number in (pair["example_id"], pair["other_id"])
        ]
        assert [copy["example_id"] for copy in line["duplicates"]] == copies
    assert pairs
    assert f"{len(pairs)} pairs of duplicates:" in printed
    assert printed.count("loss by epoch") == 2
    assert lines[0]["text"] in printed
    assert "9 examples  web" in printed
    assert "⇒ web" not in printed
    assert "\x1b" not in printed


def test_the_worst_are_left_out_of_a_new_training_file(classifier, tmp_path, capsys):
    clean = tmp_path / "clean.jsonl"
    path = audit(
        classifier,
        "--drop=17%",
        f"--output_file={clean}",
        f"--output_dir={tmp_path / 'new'}",
    )
    path = tmp_path / "new" / "audit.jsonl"
    worst = {line["example_id"] for line in lines_of(path)[:3]}
    rows = lines_of(classifier / "sources.jsonl")
    assert lines_of(clean) == [row for i, row in enumerate(rows) if i not in worst]
    printed = capsys.readouterr().out
    assert f'load_dataset("json", data_files={str(clean)!r}, split="train")' in printed
    with pytest.raises(ValueError, match=r"must be a new file .* got .*clean\.jsonl"):
        audit(classifier, "--drop=1", f"--output_file={clean}")


def test_json_is_what_the_file_has(classifier, capsys):
    path = audit(classifier, "--json")
    assert json.loads(capsys.readouterr().out) == lines_of(path)


@pytest.mark.parametrize(("given", "count"), [("2%", 20), ("0.25%", 2), ("50", 50)])
def test_a_share_or_a_number_is_dropped(given, count):
    assert count_or_share("--drop", given, 1000, 999) == count


@pytest.mark.parametrize("given", ["0", "-1", "100%", "1000", "nan%", "2.5", "some"])
def test_other_shares_are_refused(given):
    with pytest.raises(
        ValueError, match=rf"1 to 999 of 1000 rows, got '{given}'. Pass"
    ):
        count_or_share("--drop", given, 1000, 999)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"line 2 is no JSON"),
        ('{"text": "a"}\n', r"has 1 rows, and the run was trained on 18: pass"),
        ("", r"it has no rows"),
    ],
)
def test_a_bad_training_file_is_one_line_and_status_2(
    classifier, tmp_path, monkeypatch, capsys, text, message
):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    words = ["hf-sketch", "audit", str(classifier / "out"), f"--train_file={path}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        console()
    assert stopped.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "hf-sketch:" in x]
    assert message in line


def test_bad_options_are_named(classifier, tmp_path):
    with pytest.raises(ValueError, match="--drop and --output_file go together"):
        audit(classifier, "--drop=2%")
    with pytest.raises(ValueError, match=r"ends in .jsonl, got .*clean\.csv. Pass"):
        audit(classifier, "--drop=1", f"--output_file={tmp_path / 'clean.csv'}")
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 0.0"):
        audit(classifier, "--threshold=0")
    store = str(classifier / "out")
    with pytest.raises(ValueError, match=r"audit takes one store, got 2\. Call it"):
        main(["audit", store, store, "--train_file=x.jsonl"])


def test_losses_that_were_not_recorded_are_null(classifier, monkeypatch, capsys):
    found = load_sketches(classifier / "out").find_mislabeled().to_list()
    found[0]["losses"] = [math.nan, 1.0]
    found[0]["gradient_norm"] = found[0]["excess_loss"] = math.nan
    monkeypatch.setattr(
        "hf_sketch.attribution.collection.GradientRows.find_mislabeled",
        lambda self, dataset: Dataset.from_list(
            [{**line, **dataset[line["example_id"]]} for line in found]
        ),
    )
    first = lines_of(audit(classifier))[0]
    assert first["losses"] == [None, 1.0]
    assert first["gradient_norm"] is None
    assert first["why"].startswith("disagreement with the others")
    assert "loss by epoch -, 1.00; gradient norm -" in capsys.readouterr().out
