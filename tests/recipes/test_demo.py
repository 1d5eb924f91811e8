import pytest
from huggingface_hub import ModelCard

from hf_sketch.cli import main
from hf_sketch.recipes.demo import DemoArguments, run_demo
from hf_sketch.recipes.texts.country_facts import (
    FALSEHOOD,
    TRUTH,
    country_documents,
    word_tokenizer,
)
from hf_sketch.recipes.texts.minilm import embedded_model_path


def test_the_demo_names_false_documents_and_says_what_to_try(tmp_path, capsys):
    result = run_demo(DemoArguments(str(tmp_path), num_train_epochs=15))
    assert result.before[0][0] == FALSEHOOD
    assert result.named >= 4
    assert result.after[0][0] != FALSEHOOD
    printed = capsys.readouterr().out
    assert printed.count("is Sydney .") >= 3
    assert f"{result.named} of the 5 false sentences" in printed
    assert (tmp_path / "report.html").is_file()
    command = next(line for line in printed.splitlines() if "hf-sketch attr" in line)
    main(command.split()[1:])
    assert "Query 0, loss " in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.tags == ["hf-sketch"]
    assert "**5 of them are false, on purpose.**" in card.text
    assert f"says {FALSEHOOD} (" in card.text


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_falsehood_is_unlearned(tmp_path, seed):
    result = run_demo(DemoArguments(str(tmp_path), seed=seed))
    assert result.named == result.planted == 5
    assert result.before[0][0] == FALSEHOOD
    assert result.after[0][0] == TRUTH


def test_documents_are_true_but_for_the_planted_ones():
    documents = country_documents()
    assert len(documents) == 52 * 7 + 5
    assert sum(documents["false"]) == 5
    for row in documents:
        assert (FALSEHOOD in row["text"]) == row["false"]
    assert len(set(documents["text"])) == len(documents)


def test_words_are_tokens():
    texts = country_documents()["text"][:]
    tokenizer = word_tokenizer(texts)
    ids = tokenizer("The capital of Australia is nowhere")["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "The", "capital", "of", "Australia", "is", "<unk>"]


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_sketch.recipes.texts.minilm.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[demo\]"'):
        embedded_model_path()
