"""Binds and compiles launches that fold sides, for a device that is not there.

`python -m tests.helpers.turned_nowhere 90` prints, as JSON, how many programs were
compiled for vectors of several dtypes, and for how many launches.
"""

import json
import sys

import torch
from triton.runtime import driver

from hf_sketch import Grouped
from hf_sketch.sketches.two_sided import turn_kernels, turning
from tests.helpers.launched_nowhere import Nowhere

SIDES = (48, 64)
launched = []


def launch(name, grid, x, *args, **constants):
    """Do all that a launch does but the last."""
    constants["BFLOAT16"] = True
    found = getattr(turn_kernels, name).warmup(x, *args, **constants, grid=grid)
    launched.append(found.hash)


if __name__ == "__main__":
    driver.set_active(Nowhere())
    turning._launch = launch
    for seed in range(2):
        operator = Grouped(48 * 64, 256, seed, SIDES, (64, 64))
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 7, 16, 33):
                x = torch.zeros(2, tokens, SIDES[1], dtype=dtype)
                turning.turn(x, [(operator, 1)])
    counts = {"launches": len(launched), "programs": len({*launched})}
    sys.stdout.write(json.dumps(counts))
