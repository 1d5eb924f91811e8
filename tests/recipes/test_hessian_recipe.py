"""The recipe `hf-sketch hessian`, its data, and Figure 2 of its runs."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_sketch import load_spectra
from hf_sketch.callbacks import HessianSpectrumCallback
from hf_sketch.cli import main
from hf_sketch.recipes.hessian import (
    HessianArguments,
    HessianTrainingArguments,
    run_hessian,
)
from hf_sketch.recipes.tables.paper.figure_2 import Figure2Arguments, run_figure_2
from hf_sketch.recipes.texts.data_files import read_data_file
from hf_sketch.recipes.texts.entailment import load_pairs
from hf_sketch.recipes.texts.scenes import scenes
from hf_sketch.recipes.texts.xsum_data import load_xsum, own_summaries
from hf_sketch.recipes.timed_spectra import TimedSpectra
from tests.helpers.trained.recipe_runs import make_absent, write_lines
from tests.helpers.trained.tiny_models import tiny_model
from tests.helpers.trained.training import tiny_trainer

PAIRS = [
    {"premise": "a dog runs", "hypothesis": "a dog sleeps", "label": 2},
    {"premise": "a cat sleeps", "hypothesis": "a cat", "label": 0},
    {"premise": "a dog", "hypothesis": "a dog runs", "label": -1},
    {"premise": "a cat", "hypothesis": "a dog runs", "label": 1},
]


def assert_results_are_those_of_the_spectra(directory, steps):
    """Every step's line in results.json shows what its spectrum holds."""
    saved = json.loads((directory / "results.json").read_text())
    spectra = load_spectra(directory)
    assert [spectrum.step for spectrum in spectra] == steps
    assert saved["versions"]["torch"] == torch.__version__
    for spectrum, line in zip(spectra, saved["results"], strict=True):
        count = len(line["top_eigenvalues"])
        assert count == min(20, len(spectrum.sketched))
        largest = spectrum.eigenvalues.flip(0)[:count].tolist()
        assert line["top_eigenvalues"] == largest == sorted(largest, reverse=True)
        for name in ("step", "loss", "rneg", "outliers", "alignment", "mode"):
            assert line[name] == getattr(spectrum, name)
        assert line["trace"]["value"] == spectrum.trace.value
        assert line["check"]["asymmetry"] < 1e-3
        assert line["seconds"] is None or line["seconds"] > 0
    return saved, spectra


@pytest.fixture(scope="module")
def snli_run(tmp_path_factory):
    """The small run on our pairs, shortened, with what it printed."""
    directory = tmp_path_factory.mktemp("snli")
    words = ["--per_device_train_batch_size", "2", "--batches", "1", "--steps", "0,2"]
    words += ["--max_steps", "2", "--krylov_dim", "3", "--out_size", "64"]
    words += ["--save_strategy", "no", "--disable_tqdm", "true"]
    main(["hessian", "--small", *words, "--output_dir", str(directory)])
    return directory


@pytest.mark.full
def test_the_small_run_on_pairs_saves_its_spectra(snli_run):
    saved, spectra = assert_results_are_those_of_the_spectra(snli_run, [0, 2])
    settings = saved["arguments"]
    assert settings["small"]
    assert (settings["krylov_dim"], settings["out_size"]) == (3, 64)
    assert settings["training"]["optim"] == "sgd"
    assert settings["training"]["learning_rate"] == 0.1
    assert settings["name"] == "MiniLM on entailment pairs"
    (sketch,) = {spectrum.model_sketch for spectrum in spectra}
    assert (sketch.in_size, sketch.operator) == (22_714_371, "affd")
    assert spectra[0].loss == pytest.approx(1.1, abs=0.1)  # of three classes: log 3
    # The classifier's weights have moved.
    assert spectra[0].loss != spectra[1].loss
    pytest.importorskip("matplotlib")
    for name in ("figure_2.svg", "density.svg"):
        assert "<svg" in (snli_run / name).read_text()


@pytest.mark.full
def test_figure_2_is_of_several_runs(snli_run, tmp_path, capsys):
    arguments = Figure2Arguments(f"a={snli_run},b={snli_run}", str(tmp_path))
    results = run_figure_2(arguments)
    saved = json.loads((tmp_path / "figure_2.json").read_text())["results"]
    assert saved == results
    assert saved["a"] == saved["b"]
    spectra = load_spectra(snli_run)
    assert [line["rneg"] for line in saved["a"]] == [each.rneg for each in spectra]
    assert saved["a"][-1]["ratios"] == spectra[-1].ratios.tolist()
    assert "27% for Roberta" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figure_2.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figure_2.svg").read_text()


@pytest.mark.full
def test_figure_2_without_matplotlib_is_numbers(
    snli_run, tmp_path, capsys, monkeypatch
):
    make_absent(monkeypatch, "matplotlib")
    run_figure_2(Figure2Arguments(f"a={snli_run}", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["figure_2.json"]
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("runs", ["a", "=out", "a=", "a=out,b"])
def test_runs_without_a_name_or_a_directory_are_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_sketch.recipes.tables.paper.figure_2.load_spectra", lambda directory: []
    )
    with pytest.raises(ValueError, match=r"got .*: pass --runs a=out/a,b=out/b"):
        run_figure_2(Figure2Arguments(runs, str(tmp_path)))


def small_xsum(directory, **training):
    """The small run on our documents, shortened."""
    return run_hessian(
        HessianArguments(
            "xsum", small=True, steps="0,2,4", batches=1, krylov_dim=4, out_size=64
        ),
        HessianTrainingArguments(
            str(directory),
            per_device_train_batch_size=4,
            save_steps=2,
            disable_tqdm=True,
            **training,
        ),
    )


@pytest.mark.full
def test_the_small_run_on_documents_is_resumed(tmp_path, capsys):
    small_xsum(tmp_path, max_steps=2)
    first, _ = assert_results_are_those_of_the_spectra(tmp_path, [0, 2])
    assert all(line["seconds"] for line in first["results"])
    checkpoint = str(tmp_path / "checkpoint-2")
    small_xsum(tmp_path, max_steps=4, resume_from_checkpoint=checkpoint)
    saved, spectra = assert_results_are_those_of_the_spectra(tmp_path, [0, 2, 4])
    assert [line["seconds"] is None for line in saved["results"]] == [True, True, False]
    assert spectra[0].unit == "tokens"
    assert spectra[0].loss == pytest.approx(10.3, abs=0.3)  # log of the vocabulary
    printed = capsys.readouterr().out
    assert "tiny BART on short documents: 300 examples" in printed
    # The plan names the run, and the table has a line for each step.
    table = printed.splitlines()
    header = max(i for i, text in enumerate(table) if "largest eigenvalues" in text)
    assert [int(row.split()[0]) for row in table[header + 1 : header + 4]] == [0, 2, 4]


def test_a_model_without_a_padding_token_learns_from_a_file(tmp_path):
    words = sorted({word for row in PAIRS for word in row["premise"].split()})
    words = ["<eos>", *words, "sleeps", "runs"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model("gpt2", torch.float32, pad_token_id=None, eos_token_id=0)
    model.save_pretrained(tmp_path / "model")
    spectra = run_hessian(
        HessianArguments(
            model_name_or_path=str(tmp_path / "model"),
            train_file=write_lines(tmp_path / "pairs.jsonl.gz", 4 * PAIRS),
            batches=2,
            krylov_dim=5,
            out_size=64,
        ),
        HessianTrainingArguments(
            str(tmp_path / "out"),
            max_steps=1,
            per_device_train_batch_size=3,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    assert [spectrum.step for spectrum in spectra] == [0]
    assert (
        spectra[0].model_sketch.in_size
        == sum(p.numel() for p in model.transformer.parameters())
        + 3 * model.config.n_embd
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_size": 10**8}, "No Hessian spectra.*pass an out_size in that range"),
        ({"loss_fn": lambda output, inputs: output.logits}, "spectrum of step 0"),
    ],
)
def test_training_does_not_go_on_without_spectra(tmp_path, settings, message):
    callback = HessianSpectrumCallback([0], **{"krylov_dim": 2, **settings})
    with pytest.raises(UserWarning, match=message):
        tiny_trainer(tmp_path, TimedSpectra(callback)).train()


def test_files_of_every_kind_hold_the_same_rows(tmp_path):
    rows = Dataset.from_list(PAIRS)
    rows.to_csv(tmp_path / "pairs.csv")
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    write_lines(tmp_path / "pairs.jsonl", PAIRS)
    write_lines(tmp_path / "more.jsonl.gz", PAIRS)
    for name in ("pairs.csv", "pairs.json", "pairs.jsonl", "more.jsonl.gz"):
        assert read_data_file(str(tmp_path / name)).to_list() == PAIRS


def test_pairs_without_a_gold_label_are_dropped(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    assert load_pairs("train", path)["label"][:] == [2, 0, 1]


@pytest.mark.parametrize(
    ("load", "columns", "message"),
    [
        (load_pairs, {"premise": "a", "label": 1}, r"without \['hypothesis'\]: rename"),
        (load_xsum, {"text": "a", "summary": "b"}, r"without \['document'\]: rename"),
        (load_pairs, {**PAIRS[0], "label": 3}, "one of .*, got 3: replace it"),
        (load_pairs, {**PAIRS[0], "label": "other"}, "one of .*, got 'other': replace"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, load, columns, message):
    path = write_lines(tmp_path / "rows.jsonl", [columns])
    with pytest.raises(ValueError, match=message) as caught:
        load("train", path)
    assert path in str(caught.value)


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no file at .*none\.csv"):
        read_data_file(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match=r"got .*rows\.tsv: convert it"):
        read_data_file(str(tmp_path / "rows.tsv"))


def test_our_own_documents_say_what_their_summaries_do():
    words = scenes()
    splits = [own_summaries(split) for split in ("train", "validation")]
    assert [len(rows) for rows in splits] == [300, 40]
    documents = [row["document"] for rows in splits for row in rows]
    assert len({*documents}) == 340
    for row in splits[1]:
        assert 0 < 2 * len(row["summary"]) < len(row["document"])
        for kind in ("job", "action", "place"):
            (said,) = [
                group
                for group in words[kind]["groups"]
                if any(claim in row["summary"] for claim in group["claims"])
            ]
            assert any(phrase in row["document"] for phrase in said["phrases"])
