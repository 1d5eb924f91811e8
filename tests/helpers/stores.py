"""Small stores with rows of whole numbers."""

import torch

from hf_sketch import ModelSketch
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter

SKETCH = ModelSketch((("weight", (8, 4)), ("bias", (8,))), 4)
HEADER = Header(SKETCH, row_dtype="float16")


def step_row(step, value=0.5, sketch=None):
    """The row of a step."""
    number = torch.tensor([value], dtype=torch.float64)
    return {
        "epoch": torch.tensor([0]),
        "step": torch.tensor([step]),
        "learning_rate": number,
        "gradient_norm": number,
        "clip_factor": number,
        "finite": torch.tensor([True]),
        "sketch": torch.arange(4.0).unsqueeze(0) + step if sketch is None else sketch,
    }


def example_rows(step, ids, rank=0):
    """Rows of examples with these ids."""
    count = len(ids)
    same = {
        name: column.expand(count)
        for name, column in step_row(step).items()
        if name != "sketch"
    }
    return {
        **same,
        "example_id": torch.tensor(ids),
        "micro_step": torch.zeros(count, dtype=torch.int64),
        "rank": torch.full((count,), rank),
        "loss": torch.full((count,), 0.1),
        "weight": torch.ones(count, dtype=torch.float64),
        "sketch": torch.outer(torch.tensor(ids) + 1.0, torch.arange(4.0)) + step,
    }


def write_steps(directory, steps, header=None, **settings):
    """A store with a row for each of some steps, flushed once."""
    writer = SketchWriter(directory, header or Header(SKETCH), **settings)
    for step in steps:
        writer.append(PER_STEP, step_row(step))
    writer.flush()
    writer.close()
    return directory


def write_store(directory, steps=(1, 2, 3), rank=0, world_size=1, header=HEADER):
    """A store with two examples of each step, flushed after each."""
    writer = SketchWriter(directory, header, rank=rank, world_size=world_size)
    for step in steps:
        ids = [100 * step + 10 * rank + number for number in range(2)]
        writer.append(PER_EXAMPLE, example_rows(step, ids, rank))
        if rank == 0:
            writer.append(PER_STEP, step_row(step))
        writer.flush()
    writer.close()
    return directory
