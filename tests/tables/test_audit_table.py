"""Planted wrong labels and copies: what is planted, the figures, and whole runs."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_sketch.recipes.tables.quality.audit import (
    AuditStudyArguments,
    dropped_by,
    duplicates_of,
    figures_of,
    over_seeds,
    run_audit_study,
)
from hf_sketch.recipes.tables.quality.audit_tasks import (
    digits_task,
    sources_task,
)
from hf_sketch.recipes.tables.quality.planted_labels import (
    Planted,
    with_copies,
    wrong_labels,
)


def test_a_tenth_of_the_labels_is_wrong_and_copies_keep_theirs():
    task = digits_task(100, 10, 1)
    rows, wrong = wrong_labels(task, 0.1, seed=0)
    changed = [
        a["labels"] != b["labels"] for a, b in zip(rows, task.train, strict=True)
    ]
    assert changed == wrong.tolist()
    assert sum(changed) == 10
    assert {row["labels"] for row in rows} <= set(range(10))
    found = with_copies(task, rows, wrong, 5, seed=0)
    planted, exact, near = found.rows, found.exact, found.near
    assert len(exact) == len(near) == 5
    places = [place for pair in exact + near for place in pair]
    assert len(set(places)) == 20
    assert not wrong[places].any()
    assert all(planted[i] == planted[j] for i, j in exact)
    for i, j in near:
        apart = (planted[i]["x"] - planted[j]["x"]).abs()
        assert 0 < apart.max() <= 1 / 16 + 1e-6
        assert planted[i]["labels"] == planted[j]["labels"]
    kept = [i for i in range(100) if i not in places]
    assert all(planted[i] is rows[i] for i in kept)


def test_figures_are_counted_by_hand():
    wrong = torch.tensor([True, False, True, False, False] + [False] * 45)
    score = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0] + [0.0] * 45)
    figures = figures_of(score, wrong)
    assert figures["auc"] == pytest.approx(95 / 96)  # one of 2 * 48 pairs is turned
    assert figures["worst_2%"] == 1.0
    assert figures["worst_10%"] == pytest.approx(2 / 5)
    drops = dropped_by({"loss": score}, wrong, 0.1, seed=0)
    assert sorted(drops["loss"].tolist()) == [0, 1, 2, 3, 4]
    assert drops["wrong"].tolist() == [0, 2]
    assert len(drops["random"].unique()) == 5


def test_copies_that_the_data_had_before_are_neither_right_nor_wrong():
    rows = [{"x": number} for number in (0, 0, 1, 1, 2, 3, 4, 5)]
    planted = Planted(rows, torch.zeros(8), [(0, 1)], [(4, 5)])
    found = {"example_id": [0, 2, 4, 6], "other_id": [1, 3, 7, 7]}
    figures = duplicates_of(SimpleNamespace(find_duplicates=lambda: found), planted)
    assert figures["pairs"] == 3
    assert figures["precision"] == pytest.approx(1 / 3)
    assert figures["recall"] == 1 / 2
    assert figures["f1"] == pytest.approx(2 / 5)
    assert (figures["exact_found"], figures["near_found"]) == (1, 0)
    assert (figures["other_equal"], figures["other_equal_found"]) == (1, 1)


def test_gains_are_paired_by_seed_with_students_intervals():
    runs = [
        {
            "wrong_labels": {"loss": {"auc": 0.5}},
            "duplicates": {"f1": 1.0},
            "accuracy": {"all": 0.5 + seed / 10, "loss": 0.6 + seed / 10 + more},
        }
        for seed, more in enumerate((0.0, 0.02, 0.04))
    ]
    found = over_seeds(runs)
    assert found["accuracy"]["all"] == pytest.approx(0.6)
    gain = found["gains"]["loss"]
    assert gain["mean"] == pytest.approx(0.12)
    assert gain["within"] == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-2)


def test_the_study_of_digits_runs_goes_on_and_is_saved(tmp_path, capsys):
    arguments = AuditStudyArguments(str(tmp_path), drops="suspicion,random", tiny=True)
    results = run_audit_study(arguments)
    assert "suspicion" in capsys.readouterr().out
    saved = json.loads((tmp_path / "audit_digits.json").read_text())
    assert saved["results"] == json.loads(json.dumps(results))
    assert len(saved["results"]["seeds"]) == 2
    trained = [*tmp_path.glob("*/accuracies.json")]
    times = [path.stat().st_mtime_ns for path in trained]
    assert run_audit_study(arguments) == results
    assert [path.stat().st_mtime_ns for path in trained] == times


def test_files_that_are_missing_or_short_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'stocks'"):
        run_audit_study(AuditStudyArguments(task="stocks"))
    with pytest.raises(ValueError, match=r"snli needs two files, got \['a'\]: pass"):
        run_audit_study(AuditStudyArguments(task="snli", train_file="a"))
    with pytest.raises(ValueError, match=r"seeds must be from 2 to 10, got 1"):
        run_audit_study(AuditStudyArguments(seeds=1))
    path = tmp_path / "short.txt"
    path.write_text("a text of few words\n")
    with pytest.raises(ValueError, match=r"3 texts of at least 16 words, got 0"):
        sources_task(4, 2, 1, [str(path)] * 2)


@pytest.mark.full
def test_the_studies_of_texts_run(tmp_path):
    animals = ("cat", "dog", "horse", "cow")
    words = "and the man with a hat is sitting near two children who are running"
    for name, ending in (("a", "home"), ("b", "away")):
        lines = [
            " ".join(["one", animal, day, ending, words, words])
            for day in "uvwxyzabcdefghijklmnop"
            for animal in animals
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        pairs = [
            {"premise": line, "hypothesis": f"the {line[4:7]} is here", "label": i % 3}
            for i, line in enumerate(lines)
        ]
        text = "\n".join(json.dumps(pair) for pair in pairs)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = {name: str(tmp_path / name) for name in ("a.txt", "b.txt")}
    for options in (
        {"task": "sources", "source_files": ",".join(files.values())},
        {
            "task": "snli",
            "train_file": str(tmp_path / "a.jsonl"),
            "test_file": str(tmp_path / "b.jsonl"),
        },
    ):
        arguments = AuditStudyArguments(
            str(tmp_path), drops="suspicion", tiny=True, **options
        )
        results = run_audit_study(arguments)
        assert set(results["over_seeds"]["gains"]) == {"suspicion"}
