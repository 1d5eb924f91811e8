"""Rows of batches whose `position_ids` start again within a row."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch

SIZE = 256


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("positions", "examples"),
    [
        # Two rows of the dataset, each of two documents.
        ([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]], [(0, 0, 7), (1, 0, 7)]),
        # The first document goes on from where the row before was cut.
        ([[5, 6, 7, 0, 1, 2, 3]], [(0, 0, 3), (0, 3, 7)]),
    ],
    ids=["several rows", "cut document"],
)
def test_they_are_of_rows_of_the_dataset_or_of_a_rows_documents(
    positions, examples, use_cache
):
    """With a cache, the documents of a row see each other in transformers 5.24."""
    model = tiny_llama()
    sketch = ModelSketch.from_model(model, SIZE, layout="factored")
    positions = torch.tensor(positions)
    tokens = (torch.arange(positions.numel()) * 7 % 50).view(positions.shape)
    labels = tokens.where(positions != 0, -100)
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": use_cache}
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs, labels=labels).loss.backward()
        rows = sketcher.take().rows
    assert len(rows) == len(examples)
    for row, (place, start, end) in zip(rows, examples, strict=True):
        own = torch.full_like(labels, -100)
        own[place, start:end] = labels[place, start:end]
        model.zero_grad()
        model(**inputs, labels=own).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(row, sketch.sketch(gradients), rtol=1e-4, atol=1e-6)
