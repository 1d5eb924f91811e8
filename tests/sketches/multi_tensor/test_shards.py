"""Kernels that read shards: their sums over all processes are the whole's."""

import math

import pytest
import torch

from hf_sketch import ModelSketch
from tests.helpers.whole_gradients import (
    BFLOAT16,
    BLOCKED,
    DEVICE,
    FLOAT16,
    FLOAT32,
    PRECISION,
    SHAPES,
    assert_plain,
    begin,
    given,
    gradients_of,
)

pytest.importorskip("triton")


def row_shards(sketch, processes):
    """By process, which elements of each tensor it has, as FSDP2 divides the rows."""
    return [
        {name: _part(shape, rank, processes) for name, shape in sketch.shapes}
        for rank in range(processes)
    ]


def _part(shape, rank, processes):
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    each = -(-rows // processes)
    first, last = (min(place * each, rows) for place in (rank, rank + 1))
    return range(first * width, last * width)


def finished(sketch, gradients, shards, change=lambda x: x):
    """What the last process finds, and how many numbers it exchanged for that.

    `change` is applied to gradients after they are noted.
    """
    sent = []

    def join(x):
        sent.append(x.clone())
        return sum(sent)

    flat = [x.reshape(-1) for x in given(sketch, gradients)]
    for parts in shards:
        ranges = [parts[name] for name, _ in sketch.shapes]
        own = [x[at.start : at.stop] for x, at in zip(flat, ranges, strict=True)]
        kept = begin(sketch, 8, 1e-6, parts, join)
        kept.note(own)
        found = kept.finish([change(x) for x in own], 1.0)
    return found, sent[0].numel()


@pytest.mark.parametrize(
    ("sketch", "processes"),
    [
        (ModelSketch(SHAPES[:-1], 256, "grouped", seed=3), 3),
        (ModelSketch(BLOCKED[1:], 100, "blocked", seed=3), 3),
        pytest.param(ModelSketch(SHAPES, 64, "grouped"), 2, marks=pytest.mark.full),
        pytest.param(ModelSketch(BLOCKED, 2100), 2, marks=pytest.mark.full),
    ],
    ids=lambda x: f"{x.layout} {x.out_size}" if isinstance(x, ModelSketch) else str(x),
)
def test_processes_find_the_sketch_of_the_whole(sketch, processes):
    """Shards are empty, begin within blocks, folds and chunks, or have one element."""
    gradients = gradients_of(sketch.shapes, FLOAT32)
    found, _ = finished(sketch, gradients, row_shards(sketch, processes))
    assert_plain(sketch, gradients, found.row)


@pytest.mark.usefixtures("shorter_blocks")
@pytest.mark.parametrize(
    "operator", ["affd", pytest.param("fjl", marks=pytest.mark.full)]
)
def test_long_blocks_may_lie_in_several_shards(operator):
    sketch = ModelSketch(BLOCKED[1:], 100, operator=operator)
    gradients = gradients_of(sketch.shapes, BFLOAT16)
    found, _ = finished(sketch, gradients, row_shards(sketch, 3))
    assert_plain(sketch, gradients, found.row)


@pytest.mark.parametrize("dtypes", [(BFLOAT16,), (FLOAT16, FLOAT32)], ids=str)
def test_shards_of_short_dtypes_are_read_as_they_are(dtypes):
    sketch = ModelSketch(SHAPES[:-1], 64, "grouped")
    gradients = gradients_of(sketch.shapes, *dtypes)
    found, _ = finished(sketch, gradients, row_shards(sketch, 2))
    assert_plain(sketch, gradients, found.row)


@pytest.mark.parametrize("clipped", [1.0, 0.25])
def test_norms_and_clipping_are_those_of_all_shards(clipped):
    """Of the first process alone, they would be others."""
    sketch = ModelSketch(SHAPES[:3], 64, "grouped")
    gradients = gradients_of(sketch.shapes, FLOAT32)
    shards = row_shards(sketch, 2)
    found, numbers = finished(sketch, gradients, shards, lambda x: clipped * x)
    norm = math.sqrt(sum(x.double().square().sum().item() for x in gradients.values()))
    assert float(found.norm) == pytest.approx(norm, rel=1e-5)
    assert float(found.clip_factor) == pytest.approx(clipped, rel=1e-5)
    assert bool(found.finite)
    # A sketch and three norms, however large the tensors are.
    assert numbers == sketch.out_size + 3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_every_process_learns_of_infinities_that_another_has():
    sketch = ModelSketch(SHAPES[:3], 64, "grouped")
    gradients = gradients_of(sketch.shapes, FLOAT32)
    gradients["table"][0, -1] = math.inf
    found, _ = finished(sketch, gradients, row_shards(sketch, 2))
    assert not bool(found.finite)


def test_no_element_of_another_shard_is_read():
    """What lies before and behind a shard in memory is not finite."""
    sketch = ModelSketch(SHAPES[:3], 64, "grouped")
    gradients = gradients_of(sketch.shapes, FLOAT32)
    parts = row_shards(sketch, 3)[1]
    kept = begin(sketch, 8, 1e-6, parts, lambda x: x)
    own = {name: torch.zeros(shape) for name, shape in sketch.shapes}
    shards = []
    for name, part in parts.items():
        row = gradients[name].flatten()
        own[name].view(-1)[part.start : part.stop] = row[part.start : part.stop]
        row[: part.start] = row[part.stop :] = math.nan
        shards.append(row.to(DEVICE)[part.start : part.stop])
    kept.note(shards)
    row = kept.finish(shards, 1.0).row
    expected = sketch.sketch({name: x.double() for name, x in own.items()})
    atol = PRECISION * expected.abs().max().item()
    torch.testing.assert_close(row.cpu().double(), expected, rtol=0, atol=atol)
