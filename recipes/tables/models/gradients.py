"""Real per-example gradients to measure sketches on."""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sketch.recipes.demo import embedded_model_path
from hf_sketch.recipes.texts.snli_sample import load_snli_sample, tokenize


def fine_tuned_minilm(steps: int, seed: int) -> torch.nn.Module:
    """MiniLM with a classifier, after a few AdamW steps of 16 SNLI pairs each."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=3
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    data = tokenize(load_snli_sample("train").shuffle(seed=seed), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for step in tqdm(range(steps), desc="Fine-tuning", unit="step"):
        rows = data.select(range(16 * step, 16 * step + 16))
        inputs = [
            {name: row[name] for name in ("input_ids", "attention_mask")}
            for row in rows
        ]
        batch = tokenizer.pad(inputs, return_tensors="pt")
        model(**batch, labels=torch.tensor(rows["label"][:])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def per_example_gradients(model: torch.nn.Module, count: int) -> Tensor:
    """Exact gradients of validation pairs, one backward pass each.

    Shapes:
        returns (count, number of trainable elements), float32
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    data = tokenize(load_snli_sample("validation").select(range(count)), tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = torch.empty(count, sum(p.numel() for p in parameters))
    for number, row in enumerate(tqdm(data, desc="Gradients", unit="example")):
        batch = {
            name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")
        }
        loss = model(**batch, labels=torch.tensor([row["label"]])).loss
        parts = torch.autograd.grad(loss, parameters)
        torch.cat([part.flatten() for part in parts], out=rows[number])
    return rows


def as_mapping(model: torch.nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Rows cut into the parameters they belong to: name -> (b, elements), views."""
    named = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, rows.split(list(named.values()), dim=1), strict=True))
