"""The script that measures rows in Adam's geometry, on a tiny model."""

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_sketch.recipes.tables.quality.adam_geometry import AdamGeometryArguments, run
from hf_sketch.recipes.texts.minilm import embedded_model_path


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sketches_of_normalised_gradients_keep_their_inner_products(
    lora_rank, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = AdamGeometryArguments(
        output_dir=str(tmp_path),
        task="causal",
        model_name_or_path=str(tmp_path / "model"),
        max_length=16,
        examples=9,
        steps=4,
        lora_rank=lora_rank,
        out_size=256,
        seeds=2,
    )
    results = run(arguments)
    assert len(results["sketches"]["pearson_r"]) == 2
    rank_one = results["rank-one moments"]["pearson_r"][0]
    assert rank_one > results["plain gradients"]["pearson_r"][0]
    assert min(results["sketches"]["pearson_r"]) > 0.3
    assert list(tmp_path.glob("adam_geometry_causal*.json"))
