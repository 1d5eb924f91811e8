"""The inner products of rows, as the callback makes them, on a language model."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.texts.snli_sample import load_snli_sample

TOKENS, EXAMPLES, SEEDS = 64, 16, 3


def passages(count):
    """Real English, one token per byte: (count, TOKENS)."""
    text = " ".join(dict.fromkeys(load_snli_sample("train")["premise"][:])).encode()
    return torch.tensor(list(text[: count * TOKENS])).view(count, TOKENS)


def trained_language_model(batches):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 256, "n_positions": TOKENS}
    vocabulary = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def exact_gradients(model, ids):
    rows = []
    for one in ids.split(1):
        parts = torch.autograd.grad(
            model(input_ids=one, labels=one).loss, list(model.parameters())
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def test_rows_of_a_language_model_are_nearly_as_accurate_as_dense_projections():
    ids = passages(EXAMPLES + 8 * 20)
    model = trained_language_model(ids[EXAMPLES:].split(8))
    ids = ids[:EXAMPLES]
    gradients = exact_gradients(model, ids)
    exact = gradients @ gradients.T
    norms = torch.outer(exact.diagonal(), exact.diagonal()).sqrt()
    pairs = torch.triu_indices(EXAMPLES, EXAMPLES, offset=1).unbind()
    callback = GradientSketchCallback()
    squares = []
    for seed in range(SEEDS):
        sketch = ModelSketch.from_model(
            model, callback.out_size, callback.layout, seed, callback.operator
        )
        with ExampleSketcher(model, sketch) as sketcher:
            rows = sketcher.sketch({"input_ids": ids, "labels": ids}).rows
        squares.append(((rows @ rows.T - exact) / norms)[pairs].square().mean())
    # The variance of a Gaussian matrix is (|g|^2 |h|^2 + <g, h>^2) / out_size.
    dense = (1 + (exact / norms)[pairs].square().mean()) / callback.out_size
    assert torch.stack(squares).mean() < 3**2 * dense
