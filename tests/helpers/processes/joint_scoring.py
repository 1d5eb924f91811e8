"""Scores that several processes take together: a scenario of tests/processes."""

import warnings
from unittest.mock import patch

import torch
from accelerate.state import PartialState

from hf_sketch import ModelSketch
from tests.helpers.rows_in_memory import rows_of

OUT_SIZE = 64
ROWS = 22
SKETCH = ModelSketch((("weight", (2 * OUT_SIZE,)),), OUT_SIZE)


def store():
    """Rows of which one is not finite and three are the same, in many blocks."""
    matrix = torch.zeros(ROWS, OUT_SIZE)
    generator = torch.Generator().manual_seed(0)
    matrix[:, :50] = torch.randn(ROWS, 50, generator=generator)
    matrix[5, 0] = torch.nan
    matrix[18] = matrix[9] = matrix[2]
    return rows_of(matrix, SKETCH, label=[i % 3 for i in range(ROWS)])


def queries():
    matrix = torch.zeros(3, OUT_SIZE)
    matrix[:, :50] = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    matrix[2, :50] = store_row(2)
    return rows_of(matrix, SKETCH)


def store_row(number):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 50, generator=generator)[number]


def answers(rows):
    """All that is found in one pass."""
    asked = queries()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {
            "lines": rows.attribute(asked, 4, bottom_k=3).to_dict(),
            "cosine": rows.attribute(asked, 4, "cosine", bottom_k=3).to_dict(),
            "groups": rows.attribute(asked, 2, "dot", groups="label").to_dict(),
            "scores": rows.scores(asked),
            "sums": rows.scores(asked, groups="label"),
            "own": rows.self_influence(),
        }
    warned = [str(w.message) for w in caught if "Skipped" in str(w.message)]
    return {**found, "warnings": warned}


def in_blocks_of_four():
    """Rows are read four at a time, though they are short."""
    return patch("hf_sketch.store.blocks._BLOCK_ELEMENTS", 4 * OUT_SIZE)


def scores(directory):
    with in_blocks_of_four():
        found = answers(store().over_processes())
    torch.save(found, directory / f"answers-{PartialState().process_index}.pt")


SCENARIOS = {"joint/scores": scores}
