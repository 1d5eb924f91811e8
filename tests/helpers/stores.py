"""Small stores with rows of whole numbers."""

import json
from pathlib import Path

import torch
import xxhash

from hf_sketch import ModelSketch
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter

GOLDEN = {
    1: Path(__file__).parents[1] / "golden" / "sketches",
    2: Path(__file__).parents[1] / "golden" / "sketches-2",
}
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


def read_lines(path):
    """What the lines of a manifest say, without their lengths and digests."""
    contents = [json.loads(line) for line in path.read_text().splitlines()]
    for content in contents:
        del content["bytes"], content["xxh3_128"]
    return contents


def write_lines(path, contents):
    """Write a manifest by docs/format.md: nothing of the package is used."""
    written, digest = b"", ""
    for content in contents:
        rest = json.dumps(content, separators=(",", ":"))[1:] + "\n"
        size = len(rest) + 66
        blank = f'{{"bytes":{size:10d},"xxh3_128":"{"0" * 32}",{rest}'
        digest = xxhash.xxh3_128_hexdigest((digest + blank).encode())
        written += blank.replace("0" * 32, digest, 1).encode()
    path.write_bytes(written)
