"""Rows of gradients with the given numbers, without a store."""

import numpy as np
import torch
from datasets import Dataset

from hf_sketch import GradientRows, ModelSketch
from hf_sketch.store.rows import features

SKETCH = ModelSketch((("weight", (8, 4)),), 4)


def rows_of(matrix, model_sketch=SKETCH, **columns):
    """Rows in memory, of the examples 100, 101, ..."""
    count = len(matrix)
    table = {
        "example_id": np.arange(count) + 100,
        "loss": np.zeros(count, dtype=np.float32),
        "gradient_norm": matrix.norm(dim=1).numpy(),
        "finite": matrix.isfinite().all(1).numpy(),
        "sketch": matrix.numpy(),
    }
    dataset = Dataset.from_dict(table, features=features("query", matrix.shape[1]))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return GradientRows(model_sketch, dataset)


def random_matrix(rows, seed):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
