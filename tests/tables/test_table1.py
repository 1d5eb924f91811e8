import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from hf_sketch.attribution.evaluation import score_correlation
from hf_sketch.recipes.tables.models.exact_products import exact_products
from hf_sketch.recipes.tables.paper.table1 import (
    Table1Arguments,
    run_table1,
    text_study,
)
from hf_sketch.recipes.tables.paper.table1_eigenvalues import layers_of
from hf_sketch.recipes.texts.minilm import embedded_model_path


@pytest.mark.full
def test_the_scores_of_layers_run_and_are_saved(tmp_path, capsys):
    results = run_table1(Table1Arguments(str(tmp_path), tiny=True))
    names = ["token embedding", *(f"layer {n}" for n in range(1, 7)), "all else"]
    assert list(results["layers"]) == names
    assert len(results["sketch"]) == 2
    assert "the paper's layers of GPT-2: 0.16 to 0.9" in capsys.readouterr().out


@pytest.fixture
def language_model(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes
    )
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [f"the {n} cats sat on {n + 1} mats and purred" for n in range(40)]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(["short", *lines]))
    return Table1Arguments(
        str(tmp_path),
        folder,
        str(texts),
        max_length=8,
        rows=6,
        queries=3,
        steps=1,
        bits=8,
        seeds=2,
    )


def test_a_language_model_is_fine_tuned_on_whole_texts_and_measured(language_model):
    results = run_table1(language_model)
    names = ["token embedding", "layer 1", "layer 2", "all else"]
    assert list(results["layers"]) == names
    study = text_study(language_model)
    assert {len(ids) for ids in study.rows["input_ids"]} == {8}
    assert not set(map(str, study.rows)) & set(map(str, study.queries))
    model = study.text_model.model

    def gradient(row):
        ids = torch.tensor([row["input_ids"]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.flatten().clone() for p in model.parameters()]

    rows = [gradient(row) for row in study.rows]
    queries = [gradient(row) for row in study.queries]
    whole = torch.stack([torch.cat(q) for q in queries]) @ (
        torch.stack([torch.cat(r) for r in rows]).T
    )
    embedding = torch.stack([q[0] for q in queries]) @ (
        torch.stack([r[0] for r in rows]).T
    )
    r = score_correlation(embedding, whole)
    assert results["layers"]["token embedding"] == pytest.approx(r, abs=1e-5)


def test_a_model_without_rows_or_with_too_few_is_refused(language_model):
    language_model.steps = 9
    with pytest.raises(ValueError, match=r"at least 147 rows .* got 40: pass fewer"):
        run_table1(language_model)
    language_model.train_file = None
    with pytest.raises(ValueError, match=r"got none\. Pass --train_file\."):
        run_table1(language_model)


def test_layers_of_an_encoder_decoder_are_distinguished():
    config = AutoConfig.for_model(
        "bart",
        d_model=8,
        vocab_size=50,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    layers = layers_of(model)
    sides = ("encoder", "decoder")
    expected = [f"{side} layer {n}" for side in sides for n in (1, 2)]
    assert list(layers) == ["token embedding", *expected]
    for prefix in layers.values():
        assert any(name.startswith(prefix) for name, _ in model.named_parameters())
    example = {"input_ids": [3, 4], "labels": [5, 6]}

    def collate(examples):
        return {name: torch.tensor([e[name] for e in examples]) for name in example}

    found = exact_products(model, [example], [example], collate, layers)
    total = model(**collate([example])).loss
    parts = torch.autograd.grad(total, [*model.parameters()])
    squared = sum(float(part.square().sum()) for part in parts)
    assert sum(float(part) for part in found.values()) == pytest.approx(squared, 1e-4)
