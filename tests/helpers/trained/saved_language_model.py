"""A tiny causal language model on disk, beside the embedded model's tokenizer."""

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

from hf_sketch.recipes.texts.minilm import embedded_model_path


def save_language_model(folder, width):
    """Save a GPT-2 of one layer; return its folder as a command line has it."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
