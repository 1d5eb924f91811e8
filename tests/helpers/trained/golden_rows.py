"""Nine tiny training runs, and the rows that they record.

`python -m tests.helpers.trained.golden_rows tests/golden/rows.safetensors` writes the
file that later releases are compared with. Do so only where other rows are meant: where
a default changes, or where torch or transformers train the models differently.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from tests.helpers.trained.training import tiny_bert, tiny_trainer

GOLDEN = Path(__file__).parents[2] / "golden" / "rows.safetensors"
VOCABULARY = 64
RUNS = {
    "gpt2-factored": ("gpt2", {"layout": "factored"}),
    "gpt2-blocked-affd": ("gpt2", {"layout": "blocked", "operator": "affd"}),
    "gpt2-grouped": ("gpt2", {}),
    "llama-factored": ("llama", {"layout": "factored", "operator": "afjl"}),
    "llama-flat-fjl": ("llama", {"layout": "flat", "operator": "fjl"}),
    "t5-factored-sum": ("t5", {"layout": "factored", "loss": "sum"}),
    "t5-blocked-srht": ("t5", {"layout": "blocked"}),
    "bert-factored-int8": ("bert", {"layout": "factored", "row_dtype": "int8"}),
    "bert-blocked-qk-float16": (
        "bert",
        {"layout": "blocked", "operator": "qk", "row_dtype": "float16"},
    ),
}


def make_model(name):
    """A model with the family's own dropout."""
    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20}
        return GPT2LMHeadModel(GPT2Config(**text, **sizes))
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
        return LlamaForCausalLM(LlamaConfig(**text, **sizes))
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 1}
        return T5ForConditionalGeneration(T5Config(**sizes))
    return tiny_bert(vocab_size=VOCABULARY)


def make_dataset(name, rows=11, length=9):
    """Padded examples of different lengths, with the labels that the model takes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    if name == "bert":
        labels = torch.randint(0, 3, (rows,), generator=generator)
    elif name == "t5":
        labels = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
        labels[3, 3:] = -100
    columns = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return Dataset.from_dict({key: value.tolist() for key, value in columns.items()})


def train_rows(run, directory):
    """Train a run, and return the columns of its rows by kind and name."""
    name, options = RUNS[run]
    callback = GradientSketchCallback(64, **options)
    dataset, settings = make_dataset(name), {"save_strategy": "no"}
    trainer = tiny_trainer(
        directory, callback, model=make_model(name), dataset=dataset, **settings
    )
    trainer.train()
    store = load_sketches(directory)
    return {
        f"{kind}/{column}": torch.as_tensor(values).contiguous()
        for kind, rows in ((PER_EXAMPLE, store.dataset), (PER_STEP, store.steps))
        for column, values in rows.with_format("torch")[:].items()
    }


def main(path):
    """Record all runs."""
    tensors = {}
    for run in RUNS:
        with TemporaryDirectory() as directory:
            rows = train_rows(run, directory)
        tensors |= {f"{run}/{column}": values for column, values in rows.items()}
    save_file(tensors, path)


if __name__ == "__main__":
    main(sys.argv[1])
