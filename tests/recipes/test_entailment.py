"""The pairs of sentences that were written for this project."""

import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from math import log

import pytest
import torch
from transformers import AutoTokenizer

from hf_sketch.recipes.setups import snli_setup
from hf_sketch.recipes.tables.models.gradient_tasks import snli_task
from hf_sketch.recipes.tables.models.gradients import fine_tuned_minilm
from hf_sketch.recipes.tables.models.hessians import entailment_batches
from hf_sketch.recipes.texts.entailment import (
    LABELS,
    check_files,
    load_pairs,
    tokenize,
)
from hf_sketch.recipes.texts.minilm import embedded_model_path
from tests.helpers.trained.recipe_runs import write_lines

SCENES = json.loads(
    files("hf_sketch.recipes").joinpath("data", "scenes.json").read_text("utf-8")
)
KINDS = [name for name, entry in SCENES.items() if isinstance(entry, dict)]


def facts(premise):
    """The number of the group and the phrase of each kind of fact that it has."""
    return {
        kind: (number, phrase)
        for kind in KINDS
        for number, group in enumerate(SCENES[kind]["groups"])
        for phrase in group["phrases"]
        if re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", premise, re.I)
    }


CLAIMS = {
    f"{SCENES[kind][form]} {words}.".capitalize(): (kind, number, words)
    for kind in KINDS
    for number, group in enumerate(SCENES[kind]["groups"])
    for form in ("phrase", "claim")
    for words in group[f"{form}s"]
}


def reading(row):
    """The label that a reader gives, who looks everything up in the table."""
    kind, number, words = CLAIMS[row["hypothesis"].capitalize()]
    seen = facts(row["premise"])
    assert len(seen) == 2
    if kind not in seen:
        return "neutral"
    group, phrase = seen[kind]
    if words in SCENES[kind]["groups"][number]["phrases"]:
        assert group != number or phrase == words  # another would prove nothing
    return "entailment" if group == number else "contradiction"


@pytest.fixture(scope="module")
def splits():
    return {name: load_pairs(name).to_list() for name in ("train", "validation")}


def test_the_labels_are_those_of_a_reader(splits):
    for rows in splits.values():
        for row in rows:
            assert reading(row) == LABELS[row["label"]], row


def test_no_words_stand_for_two_facts():
    counts = Counter(
        words
        for kind in KINDS
        for group in SCENES[kind]["groups"]
        for words in group["phrases"] + group["claims"]
    )
    assert set(counts.values()) == {1}


def test_splits_are_balanced_and_share_no_premise(splits):
    train, validation = splits["train"], splits["validation"]
    counts = [Counter(row["label"] for row in rows) for rows in (train, validation)]
    assert counts == [{0: 667, 1: 667, 2: 666}, {0: 100, 1: 100, 2: 100}]
    assert len({row["premise"] for row in train + validation}) == 2300


def test_the_pairs_are_the_same_each_time(splits):
    assert load_pairs("validation").to_list() == splits["validation"]
    assert [list(row.values()) for row in splits["train"][:3]] == [
        [
            "In the skiing season, a left-handed person has been spotted at the crack "
            "of dawn.",
            "This happens in the skiing season.",
            0,
        ],
        [
            "In the skiing season, a curly-haired person has been spotted at "
            "lunchtime.",
            "The person is seen full of grief.",
            1,
        ],
        [
            "A freckled plasterer turns up with nobody else around.",
            "The person is a legal professional.",
            2,
        ],
    ]


def test_the_vocabulary_is_varied(splits):
    words = Counter(
        word
        for row in splits["train"]
        for word in re.findall(
            r"[\w-]+", f"{row['premise']} {row['hypothesis']}".lower()
        )
    )
    assert len(words) > 600
    assert len({row["hypothesis"] for row in splits["train"]}) > 250


@pytest.mark.parametrize("column", ["premise", "hypothesis"])
def test_one_sentence_alone_says_nothing_of_the_label(splits, column):
    """Naive Bayes on the words of one column guesses no better than chance."""
    counts = defaultdict(lambda: [1, 1, 1])
    for row in splits["train"]:
        for word in set(row[column].lower().split()):
            counts[word][row["label"]] += 1

    def guess(row):
        words = set(row[column].lower().split())
        found = [counts[word] for word in words if word in counts]
        sums = [sum(log(c[k] / sum(c)) for c in found) for k in range(3)]
        return sums.index(max(sums))

    rows = splits["validation"]
    right = sum(guess(row) == row["label"] for row in rows)
    # Chance is 100 of 300 with a standard deviation of 8.2.
    assert right < 100 + 3 * 8.2


def test_a_file_without_the_other_is_refused():
    check_files(None, None)
    check_files("a", "b")
    with pytest.raises(
        ValueError, match=r"train_file='a' and validation_file=None\. P"
    ):
        check_files("a", None)
    with pytest.raises(
        ValueError, match=r"None and validation_file='b'\. Pass --train"
    ):
        check_files(None, "b")


def small_setup(train_file):
    return snli_setup(None, train_file, True, max_samples=2, num_hidden_layers=1)


def test_a_line_says_that_the_pairs_are_not_those_of_snli(tmp_path, capsys):
    assert small_setup(None).name == "MiniLM on entailment pairs"
    line = "Training on 2 pairs written for hf_sketch, not on SNLI: pass --train_file"
    assert line in capsys.readouterr().out
    pairs = [{"premise": "a", "hypothesis": word, "label": 2} for word in "bcd"]
    path = write_lines(tmp_path / "snli.jsonl", pairs)
    setup = small_setup(path)
    assert setup.name == "MiniLM on SNLI"
    assert setup.train_dataset["hypothesis"][:] == ["b", "c"]
    assert "Training on" not in capsys.readouterr().out


def test_tables_take_pairs_from_files(tmp_path):
    pairs = [{"premise": "a dog", "hypothesis": "a cat", "label": n} for n in (2, 0, 1)]
    path = write_lines(tmp_path / "snli.jsonl", pairs)
    (batch,) = entailment_batches(2, 2, path)
    assert batch["labels"].tolist() == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    assert batch["input_ids"][0].tolist() == tokenizer("a dog", "a cat")["input_ids"]
    task = snli_task(3, 0, path, path)
    assert [int(one["labels"]) for one in task.examples] == [2, 0, 1]
    with pytest.raises(ValueError, match="Both files are needed"):
        snli_task(3, 0, path)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pretrained_model_learns_the_pairs(seed):
    """125 steps gave 0.600, 0.587 and 0.570; chance is 0.333, one error 0.028."""
    model = fine_tuned_minilm(125, seed)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    rows = tokenize(load_pairs("validation"), tokenizer)
    right = 0
    for low in range(0, len(rows), 50):
        some = rows[low : low + 50]
        inputs = {name: some[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**tokenizer.pad(inputs, return_tensors="pt")).logits
        right += int((logits.argmax(-1) == torch.tensor(some["label"])).sum())
    assert right > 0.5 * len(rows)
