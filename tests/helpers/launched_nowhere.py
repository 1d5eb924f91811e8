"""Binds and compiles what a gradient's pass launches, for a device that is not there.

`python -m tests.helpers.launched_nowhere 90 srht` prints, as JSON, what each of some
steps with other gradients and seeds launches, and how many programs were compiled for
that.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_sketch import ModelSketch
from hf_sketch.sketches.multi_tensor import gradient_pass
from hf_sketch.sketches.multi_tensor.launching import kernel_of

SHAPES = (("table", (600, 64)), ("w", (72, 96)), ("b", (96,)), ("v", (2**16 + 8,)))


class Nowhere:
    """A driver that knows its device, and has none."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launched = []


def launch(self, name, grid, *args, **kwargs):
    """Do all that a launch does but the last."""
    kernel = kernel_of(name)
    if "BFLOAT16" in kwargs:
        kwargs["BFLOAT16"] = True
    found = kernel.warmup(*args, **kwargs, enable_fp_fusion=True, grid=grid)
    launched.append((name, found.hash))


def step(seed, moved):
    """The launches of a step, with their programs."""
    sketch = ModelSketch(SHAPES, 256, "grouped", seed, sys.argv[2])
    kept = sketch.whole_gradients.begin(torch.device("cpu"), 10, 1e-6)
    gradients = [torch.randn(*moved, *shape)[0] for _, shape in SHAPES]
    launched.clear()
    kept.note(gradients)
    kept.finish(gradients, 1.0 + seed)
    return list(launched)


if __name__ == "__main__":
    driver.set_active(Nowhere())
    gradient_pass.GradientPass._launch = launch
    steps = [step(seed, moved) for seed, moved in ((0, (1,)), (1, (2,)), (2, (3,)))]
    names = [[name for name, _ in found] for found in steps]
    programs = {program for found in steps for program in found}
    sys.stdout.write(json.dumps({"steps": names, "programs": len(programs)}))
