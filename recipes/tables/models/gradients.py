"""MiniLM fine-tuned on pairs of sentences, and how the scripts fine-tune any model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sketch.recipes.texts.entailment import load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path

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


def fine_tuned_minilm(
    steps: int, seed: int, train_file: str | None = None
) -> nn.Module:
    """MiniLM with a classifier, after a few AdamW steps of 16 pairs each.

    Args:
        steps: their number.
        seed: seed of the classifier and of the order of the pairs.
        train_file: premise, hypothesis, label; by default our own pairs.
    """
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=3
    )
    fine_tune(model.train(), _pairs(steps, seed, train_file))
    return model.eval()


def _pairs(
    steps: int, seed: int, train_file: str | None
) -> Iterator[Mapping[str, Tensor]]:
    """Batches of the training pairs, shuffled."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    pairs = load_pairs("train", train_file).shuffle(seed=seed)
    data = tokenize(pairs, tokenizer)
    for low in range(0, BATCH_SIZE * steps, BATCH_SIZE):
        rows = data.select(range(low, low + BATCH_SIZE))
        inputs = [
            {name: row[name] for name in ("input_ids", "attention_mask")}
            for row in rows
        ]
        batch = tokenizer.pad(inputs, return_tensors="pt")
        yield {**batch, "labels": torch.tensor(rows["label"][:])}
