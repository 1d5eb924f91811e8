"""Choosing rows of a pool: planted topics are found, and runs resume."""

import json
import math

import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.recipes.selection.baselines import bm25_scores
from hf_sketch.recipes.selection.choice import (
    best_rows,
    diverse_rows,
    over_tasks,
)
from hf_sketch.store.header import Header
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import SKETCH
from tests.helpers.trained.saved_language_model import save_language_model

SEA = ["the sea carries ships to the harbour", "waves of the sea wash the harbour"]
COOK = ["boil the rice and add salt to the pan", "add butter to the pan and boil it"]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A small model, a pool of two topics in turn, and queries of one of them."""
    directory = tmp_path_factory.mktemp("select")
    save_language_model(directory / "model", 32)
    pool = [f"{(SEA, COOK)[i % 2][i // 2 % 2]} on day {i}" for i in range(40)]
    (directory / "pool.txt").write_text("\n".join(pool))
    asked = [f"ships wait in the harbour of the sea {i}" for i in range(4)]
    lines = [{"text": text, "task": "sea"} for text in asked]
    text = "\n".join(map(json.dumps, lines))
    (directory / "queries.jsonl").write_text(text)
    return directory


def select(language, output, *options):
    return main(
        [
            "select",
            f"--model_name_or_path={language / 'model'}",
            f"--train_file={language / 'pool.txt'}",
            f"--query_file={language / 'queries.jsonl'}",
            f"--output_file={output / 'chosen.jsonl'}",
            f"--output_dir={output / 'run'}",
            "--keep=25%",
            "--learning_rate=0.01",
            "--out_size=256",
            "--report_to=none",
            "--use_cpu",
            "--per_device_train_batch_size=4",
            *options,
        ]
    )


def chosen(output):
    lines = (output / "chosen.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_of_the_queries_topic_are_chosen_and_runs_go_on(
    language, tmp_path, capsys
):
    select(language, tmp_path)
    rows = chosen(tmp_path)
    assert len(rows) == 10
    assert sum("sea" in row["text"] for row in rows) >= 9  # by chance 1 in 1,500
    assert all(("sea" in row["text"]) == (row["example_id"] % 2 == 0) for row in rows)
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "Chose 10 of 40 rows" in capsys.readouterr().out
    store = load_sketches(tmp_path / "run")
    assert (
        store.model_sketch.normalizer.step == 1
    )  # after a tenth of ten steps' warm-up
    assert len(set(store.dataset["example_id"])) == 36
    # The finished run is not trained again, and gives the same.
    before = store.dataset["sketch"][:]
    select(language, tmp_path)
    assert load_sketches(tmp_path / "run").dataset["sketch"][:] == before
    assert chosen(tmp_path) == rows
    # Nor does a recorded run at hand train: its rows and its checkpoint do.
    (tmp_path / "again").mkdir()
    select(language, tmp_path / "again", f"--sketches={tmp_path / 'run'}")
    assert not (tmp_path / "again" / "run").exists()
    assert chosen(tmp_path / "again") == rows


@pytest.mark.parametrize(
    ("rows", "message"), [(40, "must have a checkpoint"), (39, "trained on 39")]
)
def test_a_run_at_hand_must_have_a_model_and_the_pools_rows(
    language, tmp_path, rows, message
):
    SketchWriter(tmp_path / "done" / "sketches", Header(SKETCH, train_rows=rows))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        select(language, tmp_path, f"--sketches={tmp_path / 'done'}")


@pytest.mark.full
def test_choices_are_compared_on_held_out_queries(language, tmp_path, capsys):
    options = ("--baseline=random,bm25,rds", "--diversity=0.3", "--compare_epochs=1")
    select(language, tmp_path, *options)
    printed = capsys.readouterr().out
    for name in ("gradients", "random", "bm25", "rds"):
        assert f"  {name}" in printed
    assert len({row["example_id"] for row in chosen(tmp_path)}) == 10


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--keep=0%", "--keep must be a share or a number"),
        ("--keep=41", "1 to 40 of 40 rows, got '41'"),
        ("--baseline=dice", "among random, bm25, rds, got"),
        ("--diversity=1", "diversity must be in"),
        ("--over_tasks=least", "over_tasks must be"),
        ("--task_column=kind", "must have the columns"),
    ],
)
def test_bad_options_fail_before_training(language, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        select(language, tmp_path, option)
    assert not (tmp_path / "run").exists()


def test_scores_of_tasks_are_means_of_queries_then_the_largest_or_the_mean():
    scores = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    tasks = ["a", "a", "b"]
    assert over_tasks(scores, tasks, "max").tolist() == [2, 5]
    assert over_tasks(scores, tasks, "mean").tolist() == [1, 3]


def test_diverse_rows_leave_out_likenesses():
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = torch.tensor([0.9, 0.8, 0.5])
    assert best_rows(scores, 2).tolist() == [0, 1]
    # 0.5 * 0.8 - 0.5 * 1 is less than 0.5 * 0.5 - 0.5 * 0.
    assert diverse_rows(scores, directions, 2, 0.5).tolist() == [0, 2]


def test_bm25_is_the_formula_of_lucene():
    pytest.importorskip("bm25s")
    texts = ["harbour ships ships", "rice butter", "harbour rice salt pepper"]
    found = bm25_scores(texts, ["ships"])
    length, mean = 3, 3
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    weight = 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * length / mean))
    assert found[0].tolist() == pytest.approx([idf * weight, 0, 0], rel=1e-5)
