"""The recipes `hf-sketch snli` and `hf-sketch xsum`, shortened."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, set_seed

from hf_sketch import load_dimension_search
from hf_sketch.cli import main
from hf_sketch.recipes.options.dimension import DimensionArguments
from hf_sketch.recipes.setups import xsum_setup
from hf_sketch.recipes.snli import SnliArguments, SnliTrainingArguments, run_snli
from hf_sketch.recipes.tables.paper.table10 import (
    Table10Arguments,
    log2_dims,
    run_table10,
    settings_of,
)
from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.xsum import XsumArguments, XsumTrainingArguments
from tests.helpers.trained.recipe_runs import (
    assert_saved,
    barely_trained,
    make_absent,
    small_xsum,
    write_lines,
)
from tests.helpers.trained.tiny_models import tiny_model


@pytest.fixture(scope="module")
def xsum_run(tmp_path_factory):
    """A search that a small baseline ends, by the command."""
    directory = tmp_path_factory.mktemp("xsum")
    words = ["--small", "--baseline_steps", "2", "--baseline_learning_rate", "0"]
    words += ["--stage_steps", "2", "--max_steps", "4", "--bisections", "2"]
    words += ["--max_eval_samples", "3", "--disable_tqdm", "true", "--seed", "3"]
    main(["xsum", *words, "--output_dir", str(directory)])
    return directory


@barely_trained
@pytest.mark.full
def test_the_command_saves_what_it_found(xsum_run):
    saved = json.loads((xsum_run / "results.json").read_text())
    search = load_dimension_search(xsum_run)
    results, settings = saved["results"], saved["arguments"]
    # A model that was not trained reaches nothing, 90% of which is reached at once.
    assert (results["baseline"], results["target"]) == (0, 0)
    assert results["dimension"] == search.dimension == 16
    assert results["path"] == [dataclasses.asdict(stage) for stage in search.path]
    assert [stage["step"] for stage in results["path"]] == [0, 2]
    assert results["seconds"] > 0
    assert settings["recipe"] == "xsum"
    assert settings["name"] == "tiny BART on short documents"
    assert settings["training"]["seed"] == 3
    assert settings["training"]["lr_scheduler_type"] == "constant"
    adapter = json.loads((xsum_run / "adapter_config.json").read_text())
    assert (adapter["dim"], adapter["max_dim"], adapter["seed"]) == (16, 1024, 3)


@barely_trained
@pytest.mark.full
def test_the_adapter_is_loaded_on_a_model_drawn_as_the_card_says(xsum_run):
    assert "transformers.set_seed(3)" in (xsum_run / "README.md").read_text()
    set_seed(4)
    with pytest.raises(ValueError, match="fingerprint"):
        PeftModel.from_pretrained(xsum_setup(None, None, True).model, xsum_run)
    set_seed(3)
    base = xsum_setup(None, None, True).model
    assert len(PeftModel.from_pretrained(base, xsum_run).base_model.omega) == 16


@barely_trained
@pytest.mark.full
def test_smaller_dimensions_are_tried_with_three_seeds(xsum_run):
    interval = json.loads((xsum_run / "results.json").read_text())["results"][
        "interval"
    ]
    trials = [{"dim": d, "best": [0, 0, 0], "reached": True} for d in (8, 4)]
    assert interval == {"low": 0, "high": 4, "trials": trials}


@barely_trained
@pytest.mark.full
def test_the_model_card_has_the_path_and_no_folder_of_this_machine(xsum_run):
    card = (xsum_run / "README.md").read_text()
    assert "| 2 | 16 | 0.0000 | reached |" in card
    assert "The least dimension is at most 4: most trainings reach" in card
    assert "Tried: 8: 0.0000, 0.0000, 0.0000; 4: 0.0000" in card
    assert "base_model:" not in card
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- hf-sketch\n- intrin")
    assert "of tiny BART move" in card
    assert "/" not in card.replace("hf-sketch", "")
    pytest.importorskip("matplotlib")
    assert "<svg" in (xsum_run / "intrinsic_dimension.svg").read_text()


@pytest.mark.full
def test_a_search_on_documents_is_resumed(tmp_path, capsys):
    first = small_xsum(tmp_path, max_steps=2)
    assert [stage.step for stage in first.path] == [0, 1, 2]
    second = small_xsum(tmp_path, max_steps=3, resume_from_checkpoint="true")
    assert [stage.dim for stage in second.path] == [16, 16, 32, 64]
    assert second.path[:3] == first.path
    assert second.path[-1].decision == "exhausted"
    assert second.dimension is None
    assert "Up to 64 dimensions did not reach eval_rouge1" in capsys.readouterr().out
    whole = small_xsum(tmp_path / "whole", max_steps=3)
    assert second == whole


@barely_trained
@pytest.mark.full
def test_a_resumed_run_keeps_the_figure_of_full_fine_tuning(tmp_path):
    baseline = {"baseline_steps": 1, "target": None}
    small_xsum(tmp_path, baseline, max_steps=1)
    saved = tmp_path / "baseline" / "baseline.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "mark": 1}))
    small_xsum(tmp_path, baseline, max_steps=1, resume_from_checkpoint="true")
    assert "mark" in json.loads(saved.read_text())
    other = {**baseline, "baseline_steps": 2}
    with pytest.raises(ValueError, match=r"got \{'max_steps': 1\}: .*delete that"):
        small_xsum(tmp_path, other, max_steps=1, resume_from_checkpoint="true")
    other = {**baseline, "max_target_length": 5}
    with pytest.raises(ValueError, match=r"must have had \{'max_target_length': 5\}"):
        small_xsum(tmp_path, other, max_steps=1, resume_from_checkpoint="true")
    small_xsum(tmp_path, baseline, max_steps=1)
    assert "mark" not in json.loads(saved.read_text())


@pytest.mark.parametrize(
    "operator", ["affd", pytest.param("qk", marks=pytest.mark.full)]
)
def test_a_classifier_in_files_of_ours_is_searched(tmp_path, operator):
    words = [
        {"premise": "a dog", "hypothesis": f"{n}", "label": n % 3} for n in range(8)
    ]
    path = write_lines(tmp_path / "pairs.jsonl.gz", words)
    model = classifier_folder(tmp_path / "model")
    arguments = SnliArguments(
        model_name_or_path=model,
        train_file=path,
        validation_file=path,
        operator=operator,
        start_dim=4,
        max_dim=16,
        stage_steps=1,
        target=1.0,
        min_improvement=1.0,
        max_train_samples=6,
        max_eval_samples=5,
        num_hidden_layers=1,
    )
    training = SnliTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=5, disable_tqdm=True
    )
    search = run_snli(arguments, training)
    assert [stage.dim for stage in search.path] == [4, 4, 8, 16]
    assert all(round(5 * stage.metric, 6).is_integer() for stage in search.path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["operator"] == operator
    assert config["layout"] == {"affd": "blocked", "qk": "flat"}[operator]


def classifier_folder(folder):
    """A tiny BERT with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    tokenizer.save_pretrained(folder)
    model = tiny_model("bert", torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    return str(folder)


# EncoderDecoderModel warns of a change in 4.12 whenever it is given labels.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.full
def test_an_encoder_becomes_an_encoder_and_a_decoder(tmp_path):
    folder = classifier_folder(tmp_path / "model")
    setup = xsum_setup(
        folder,
        None,
        True,
        16,
        8,
        num_hidden_layers=1,
        encoder_decoder=True,
        max_samples=3,
    )
    assert len(setup.train_dataset) == 3
    model, tokenizer = setup.model, setup.tokenizer
    assert (
        len(model.encoder.encoder.layer) == len(model.decoder.bert.encoder.layer) == 1
    )
    assert model.config.decoder_start_token_id == tokenizer.cls_token_id
    encoded = tokenizer("a dog runs", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**encoded, max_length=5)
    assert tokens[0, 0] == tokenizer.cls_token_id
    assert model.generation_config.eos_token_id == tokenizer.sep_token_id
    rows = [setup.train_dataset[0], setup.train_dataset[1]]
    assert model(**setup.collator(rows)).loss.isfinite()


def test_the_target_is_the_papers_unless_full_fine_tuning_is_measured():
    assert DimensionArguments().given_target == 0.801
    assert DimensionArguments(metric="eval_rouge1").given_target == 36.6
    assert DimensionArguments(baseline=True).given_target is None
    assert DimensionArguments(baseline=True, target=0.5).given_target == 0.5
    with pytest.raises(ValueError, match=r"got 'eval_f1': pass --target or --baseline"):
        _ = DimensionArguments(metric="eval_f1").given_target


def test_defaults_are_the_papers():
    arguments, training = SnliArguments(), SnliTrainingArguments()
    assert (arguments.stage_steps, arguments.min_improvement) == (2000, 0.001)
    assert (arguments.baseline_steps, training.max_steps) == (10_000, 10_000)
    assert (arguments.baseline_learning_rate, training.learning_rate) == (2e-5, 1e-4)
    arguments, training = XsumArguments(), XsumTrainingArguments()
    assert (arguments.stage_steps, arguments.min_improvement) == (2000, 0.5)
    assert (arguments.baseline_steps, training.max_steps) == (20_000, 40_000)
    assert training.per_device_train_batch_size == 32
    assert training.predict_with_generate


def test_a_metric_that_evaluation_does_not_give_is_refused(tmp_path):
    settings = {"target": None, "baseline_steps": 1, "metric": "eval_f1"}
    with pytest.raises(ValueError, match=r"'eval_rouge1'.*got 'eval_f1'"):
        small_xsum(tmp_path, settings, max_steps=1)
    assert not list(tmp_path.iterdir())  # nothing was trained


def test_recipes_without_their_metrics_name_the_extra(tmp_path, monkeypatch):
    make_absent(monkeypatch, "evaluate")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-sketch\[recipes\]"):
        small_xsum(tmp_path)


@barely_trained
@pytest.mark.full
def test_table_10_keeps_the_runs_that_have_ended(tmp_path, capsys):
    arguments = Table10Arguments(str(tmp_path), "affd,qk", seeds=1, tiny=True)
    results = run_table10(arguments)
    assert_saved(tmp_path / "table10.json", results)
    assert "affd  " in capsys.readouterr().out
    kept = tmp_path / "table10" / "qk-0" / "results.json"
    report = json.loads(kept.read_text())
    assert report["results"]["path"] == results["qk"][0]["path"]
    report["results"]["seconds"] = 12345.0
    kept.write_text(json.dumps(report))
    again = run_table10(arguments)
    assert again["affd"] == results["affd"]
    assert again["qk"][0]["seconds"] == 12345.0


@pytest.mark.parametrize(
    "changes", [{"min_improvement": 0.5}, {"learning_rate": 0.5}, {"batch_size": 7}]
)
def test_table_10_refuses_to_mix_settings(tmp_path, changes):
    (tmp_path / "table10").mkdir()
    kept = tmp_path / "table10" / "settings.json"
    kept.write_text(json.dumps(settings_of(Table10Arguments())))
    ((name, value),) = changes.items()
    message = rf"must have {{'{name}': .*got {{'{name}': {value}}}: pass another --out"
    with pytest.raises(ValueError, match=message):
        run_table10(Table10Arguments(str(tmp_path), **changes))


@barely_trained
@pytest.mark.full
def test_table_10_has_documents(tmp_path, capsys):
    results = run_table10(Table10Arguments(str(tmp_path), "qk", 1, "xsum", tiny=True))
    assert_saved(tmp_path / "table10_xsum.json", results)
    assert results["qk"][0]["metric"] == "eval_rouge1"
    saved = json.loads((tmp_path / "table10_xsum.json").read_text())
    assert saved["arguments"]["min_improvement"] == 0.5
    assert "paper (26, 25, 26)" in capsys.readouterr().out


def test_dimensions_are_shown_by_their_logarithms():
    runs = [{"dimension": 16}, {"dimension": None}, {"dimension": 2**13}]
    assert log2_dims(runs) == [4, None, 13]
