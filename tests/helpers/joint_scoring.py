"""Scores that several processes take together, for tests to start.

`torchrun --nproc_per_node 2 --module tests.helpers.joint_scoring <file>`.
"""

import sys
import warnings

import torch

from hf_sketch import ModelSketch
from hf_sketch.processes import end_group
from tests.helpers.rows_in_memory import rows_of

OUT_SIZE = 2**20  # blocks of four rows
ROWS = 22
SKETCH = ModelSketch((("weight", (2**21,)),), OUT_SIZE)


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
            "groups": rows.attribute(asked, 2, groups="label").to_dict(),
            "scores": rows.scores(asked),
            "sums": rows.scores(asked, groups="label"),
            "own": rows.self_influence(),
        }
    told = [str(w.message) for w in caught if "passed over" in str(w.message)]
    return {**found, "warnings": told}


def main(file):
    found = answers(store().over_processes())
    torch.save(found, f"{file}-{torch.distributed.get_rank()}.pt")
    end_group()


if __name__ == "__main__":
    main(sys.argv[1])
