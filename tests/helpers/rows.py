"""Comparing the rows of two runs."""

import torch

from hf_sketch import load_sketches


def columns(dataset):
    return dataset.with_format("torch")[:]


def in_order(rows):
    """Rows by epoch and example."""
    key = rows["epoch"] * 1000 + rows["example_id"]
    assert len(key.unique()) == len(key)
    order = key.argsort()
    return {name: column[order] for name, column in rows.items()}


def assert_same_rows(got, expected):
    """All rows are the same up to rounding."""
    steps, wanted = columns(got.steps), columns(expected.steps)
    for name in wanted:
        torch.testing.assert_close(steps[name], wanted[name], rtol=1e-5, atol=1e-6)
    rows, wanted = in_order(columns(got.dataset)), in_order(columns(expected.dataset))
    for name in ("example_id", "epoch", "step", "micro_step", "weight"):
        assert torch.equal(rows[name], wanted[name])
    for name in ("learning_rate", "loss", "gradient_norm", "sketch"):
        torch.testing.assert_close(rows[name], wanted[name], rtol=1e-4, atol=1e-6)


def rows_of(output_dir):
    """All rows as a set of hashable tuples, bit for bit, plus their number."""
    store = load_sketches(output_dir)
    tables = [store.dataset.with_format("arrow"), store.steps.with_format("arrow")]
    lists = [table[:].to_pylist() for table in tables]
    as_tuples = [
        tuple(tuple(v) if isinstance(v, list) else v for v in row.values())
        for rows in lists
        for row in rows
    ]
    return set(as_tuples), len(as_tuples)
