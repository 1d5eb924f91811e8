"""The command that answers queries, and the recipe that trains, asks and reports."""

import gzip

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertModel,
)

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.attribution.record import (
    FILE,
    load_attribution,
    record_attribution,
)
from hf_sketch.cli import main
from hf_sketch.recipes.texts.text_rows import load_text_model, text_columns, tokenized
from hf_sketch.spectra.files import save_spectrum
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.spectra import VALUES, made_of
from tests.helpers.trained.saved_language_model import save_language_model
from tests.helpers.trained.text_classifier import ROWS, SMALL, trained_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return trained_classifier(tmp_path_factory.mktemp("classifier"), 256)


def ask(directory, *options):
    main(
        [
            "attribute",
            str(directory / "out"),
            f"--queries={directory / 'queries.jsonl'}",
            f"--model={directory / 'model'}",
            f"--train_file={directory / 'train.json'}",
            *options,
        ]
    )
    return load_attribution(directory / "out" / FILE)


def test_the_command_gives_the_scores_of_the_library(classifier, capsys):
    record = ask(classifier, "--top_k=2", "--bottom_k=1")
    store = load_sketches(classifier / "out")
    text_model = load_text_model(str(classifier / "model"))
    inputs = tokenized(
        Dataset.from_list(ROWS[:3]), text_model, ["premise", "hypothesis"]
    )
    queries = sketch_dataset(
        text_model.model,
        inputs,
        store.model_sketch,
        data_collator=text_model.collator,
    )
    sums = store.scores(queries, groups="example_id")
    printed = capsys.readouterr().out
    assert record.method == "Preconditioned"
    for scores, query, row in zip(sums, record.queries, ROWS, strict=False):
        best = scores.argsort(descending=True)[[0, 1, -1]].tolist()
        assert [line["example_id"] for line in query.lines] == best
        expected = [float(scores[place]) for place in best]
        got = [line["score"] for line in query.lines]
        assert got == pytest.approx(expected, rel=1e-5)
        text = f"[{row['label']}] {row['premise']} ⇒ {row['hypothesis']}"
        assert query.text == text
        assert text in printed
        chosen = ROWS[best[0]]
        assert query.lines[0]["text"].endswith(chosen["hypothesis"])
        assert query.tokens == []


@pytest.mark.parametrize("method", ["cosine", "tracin", "preconditioned"])
def test_the_command_takes_every_method(classifier, method):
    options = ["--damping=0.5"] if method == "preconditioned" else []
    record = ask(classifier, f"--method={method}", *options)
    assert record.method.lower() == method
    assert len(record.queries) == 3
    assert len(record.queries[0].lines) == 10


def test_a_training_file_with_other_rows_is_refused(classifier, tmp_path):
    path = tmp_path / "filtered.jsonl"
    Dataset.from_list(ROWS[1:]).to_json(path)
    count = len(ROWS)
    with pytest.raises(
        ValueError, match=rf"{count - 1} rows, and the run was trained on {count}: pass"
    ):
        ask(classifier, f"--train_file={path}")


def test_influence_takes_the_last_spectrum_of_the_run(classifier):
    sketch = load_sketches(classifier / "out").model_sketch
    vectors = torch.linalg.qr(torch.randn(256, 3))[0].T.contiguous()
    spectrum = made_of(VALUES, model_sketch=sketch, vectors=vectors)
    save_spectrum(classifier / "out" / "curvature", spectrum)
    record = ask(classifier, "--method=influence", "--damping=0.2")
    assert record.method == "Influence"


def test_bad_input_is_named(classifier, tmp_path):
    with pytest.raises(
        ValueError, match=r"damping is for .* got it for 'cosine': leave"
    ):
        ask(classifier, "--damping=1", "--method=cosine")
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'magic'"):
        ask(classifier, "--method=magic")
    store = str(classifier / "out")
    with pytest.raises(ValueError, match="takes one store, got 2: join them with"):
        main(["attribute", store, store, "--queries=q", "--model=m"])
    with pytest.raises(
        FileNotFoundError, match=r"there, got no file at .*nothing\.json"
    ):
        ask(classifier, f"--queries={tmp_path / 'nothing.json'}")
    rows = Dataset.from_list([{"body": "text"}])
    text_model = load_text_model(str(classifier / "model"))
    with pytest.raises(ValueError, match=r"got \['body'\]: name those of the texts"):
        text_columns(rows, "causal")
    with pytest.raises(ValueError, match=r"have a column label, got \['body'\]: add"):
        tokenized(rows, text_model, ["body"])
    BertModel(BertConfig(**SMALL, intermediate_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got BertModel in .*: sketch its queries in"):
        load_text_model(str(tmp_path))


def test_spectra_and_report_are_made_from_the_shell(classifier, capsys, tmp_path):
    directory = str(classifier / "out")
    save_spectrum(classifier / "out" / "curvature", made_of(VALUES))
    main(["spectrum", directory, f"--plot={tmp_path / 'figure.svg'}"])
    assert f"{float(made_of(VALUES).eigenvalues[-1]):.4g}" in capsys.readouterr().out
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    main(["report", directory])
    assert "report.html" in capsys.readouterr().out
    assert (classifier / "out" / "report.html").is_file()
    with pytest.raises(ValueError, match="output_file is for one DIR, got 2: leave"):
        main(["report", directory, directory, f"--output_file={tmp_path / 'a.html'}"])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny causal model with a tokenizer, and passages."""
    directory = tmp_path_factory.mktemp("language")
    save_language_model(directory / "model", 16)
    lines = [f"passage number {i} tells of the river and of the sea" for i in range(12)]
    lines.insert(3, " = A heading = ")
    with gzip.open(directory / "train.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    (directory / "queries.txt").write_text("the sea tells of the river and of passages")
    return directory


def test_the_recipe_trains_asks_and_reports(language_model, tmp_path, capsys):
    main(
        [
            "wikitext",
            f"--model_name_or_path={language_model / 'model'}",
            f"--train_file={language_model / 'train.txt.gz'}",
            f"--query_file={language_model / 'queries.txt'}",
            f"--output_dir={tmp_path}",
            "--min_words=8",
            "--out_size=64",
            "--num_train_epochs=2",
            "--report_to=none",
            "--use_cpu",
            "--top_k=3",
            "--bottom_k=2",
            "--token_scores",
        ]
    )
    store = load_sketches(tmp_path)
    assert store.dataset.unique("example_id") is not None
    assert sorted(store.dataset.unique("example_id")) == list(range(12))
    record = load_attribution(tmp_path / FILE)
    (query,) = record.queries
    assert record.method == "tracin"
    assert [line["rank"] for line in query.lines] == [0, 1, 2, -2, -1]
    assert all("passage number" in line["text"] for line in query.lines)
    mean = sum(loss for _, loss in query.tokens[1:]) / (len(query.tokens) - 1)
    assert mean == pytest.approx(query.loss, rel=1e-4)
    assert len(query.token_scores) == len(query.lines)
    for line, parts in zip(query.lines, query.token_scores, strict=True):
        assert len(parts) == len(query.tokens)
        assert parts[0] == 0
        assert sum(parts) == pytest.approx(line["score"], rel=1e-4)
        assert max(map(abs, parts)) > 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "the sea tells" in page
    sides = [line["score"] * (1 if line["rank"] >= 0 else -1) for line in query.lines]
    shown = sum(score > 0 for score in sides)
    assert page.count("which of the query's tokens") == shown > 0


def test_scores_of_tokens_are_refused_where_there_are_none(classifier):
    with pytest.raises(ValueError, match="of causal language models, got a classif"):
        ask(classifier, "--token_scores")
    store = load_sketches(classifier / "out")
    with pytest.raises(ValueError, match="linear in the query, got cosine: take"):
        record_attribution(store, store, [], method="cosine", token_sketches=[])


def test_the_command_takes_groups_of_layers(tmp_path, classifier):
    groups = {"head": "classifier", "rest": None}
    directory = trained_classifier(tmp_path, 64, groups=groups)
    store = load_sketches(directory / "out")
    assert store.dataset.features["sketch"].length == 128
    text_model = load_text_model(str(directory / "model"))
    columns = ["premise", "hypothesis"]
    inputs = tokenized(Dataset.from_list(ROWS[:3]), text_model, columns)
    collator = text_model.collator
    queries = sketch_dataset(
        text_model.model, inputs, store.model_sketch, data_collator=collator
    )
    at = store.model_sketch.layer_groups.columns
    rows, asked = (sketch_matrix(x.dataset) for x in (store, queries))
    parts = {name: asked[:, at[name]] @ rows[:, at[name]].T for name in at}
    ids = torch.tensor(store.dataset["example_id"][:])
    for option, expected in (
        ("head", parts["head"]),
        ("rest=0.5,head=3", parts["rest"] / 2 + 3 * parts["head"]),
    ):
        record = ask(directory, f"--layers={option}", "--method=dot")
        for scores, query in zip(expected, record.queries, strict=True):
            for line in query.lines:
                wanted = scores[ids == line["example_id"]].sum()
                assert line["score"] == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(ValueError, match=r"must be some of \['rest', 'head'\], got"):
        ask(directory, "--layers=tail")
    with pytest.raises(ValueError, match="one sketch for all: record them with Grad"):
        ask(classifier, "--layers=head")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--method=magic", r"method must be one of .*'influence', got 'magic'"),
        ("--damping=1", "damping is for .* got it for 'tracin': leave it out"),
        ("--top_k=-1", "top_k must be at least 1, or bottom_k, got -1 and 5: pass"),
        ("--num_queries=0", "num_queries must be an integer of at least 1, got 0"),
        ("--max_length=0", "max_length must be an integer of at least 1, got 0"),
        ("--out_size=0", "out_size must be an integer of at least 1, got 0"),
        ("--max_train_samples=-1", "max_train_samples must be .* 1, got -1"),
        ("--train_file=train.bin", r"must end in one of .* got train\.bin: convert"),
        ("--query_file=gone.txt", r"must be there, got no file at gone\.txt"),
        ("--method=influence", "No spectra at .*HessianSpectrumCallback"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(option, message, tmp_path):
    nowhere = f"--model_name_or_path={tmp_path / 'nothing'}"
    output = f"--output_dir={tmp_path / 'out'}"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["wikitext", nowhere, output, "--report_to=none", option])


def test_the_recipe_wants_a_causal_model_and_long_passages(classifier, language_model):
    files = [f"--train_file={language_model / 'train.txt.gz'}"]
    with pytest.raises(ValueError, match="language model, got a classification model"):
        main(["wikitext", f"--model_name_or_path={classifier / 'model'}", *files])
    with pytest.raises(
        ValueError, match="at least 99 words, got none in 13 rows: pass"
    ):
        main(
            [
                "wikitext",
                f"--model_name_or_path={language_model / 'model'}",
                "--min_words=99",
                *files,
            ]
        )
