"""MiniLM fine-tuned on SNLI, and how the scripts fine-tune any model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.texts.snli_sample import load_snli_sample, tokenize

BATCH_SIZE = 16


def fine_tune(
    model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> torch.optim.AdamW:
    """Take an AdamW step per batch of inputs with labels; return the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in tqdm(batches, desc="Fine-tuning", unit="step"):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def fine_tuned_minilm(steps: int, seed: int) -> nn.Module:
    """MiniLM with a classifier, after a few AdamW steps of 16 SNLI pairs each."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=3
    )
    fine_tune(model.train(), _pairs(steps, seed))
    return model.eval()


def _pairs(steps: int, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Batches of the sample of SNLI, shuffled."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    data = tokenize(load_snli_sample("train").shuffle(seed=seed), tokenizer)
    for low in range(0, BATCH_SIZE * steps, BATCH_SIZE):
        rows = data.select(range(low, low + BATCH_SIZE))
        inputs = [
            {name: row[name] for name in ("input_ids", "attention_mask")}
            for row in rows
        ]
        batch = tokenizer.pad(inputs, return_tensors="pt")
        yield {**batch, "labels": torch.tensor(rows["label"][:])}
