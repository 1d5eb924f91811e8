"""Kernels compile for the devices that are in use, whether or not one is there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = {"gather", "add_rows", "finish_row", "sum_blocks", "sum_matrices"}
KERNELS |= {"sum_long_blocks", "sum_whole", "rotate_tiles", "sum_strips", "turn_sides"}
KERNELS |= {
    "turn_softmax",
    "spread",
    "lift_blocks",
    "lift_long_blocks",
    "lift_matrices",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton"
)


def run(cache, helper, *arguments):
    """What a helper prints, in a process whose Triton does not interpret."""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", f"tests.helpers.{helper}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("capability", "which"),
    [
        *((x, "once") for x in (80, 90, 100)),
        *(pytest.param(x, "all", marks=pytest.mark.full) for x in (80, 90, 100)),
    ],
)
def test_every_kernel_compiles_without_a_device(capability, which, tmp_path):
    found = run(tmp_path, "ahead_of_time", str(capability), which)
    assert {kernel["kernel"] for kernel in found} == KERNELS
    for kernel in found:
        assert kernel["target"] == f"sm_{capability}"
        assert kernel["bytes"] > 0
        assert kernel["atomics"] == 0, kernel  # sums have one order
        if kernel["kernel"].startswith(("sum", "rotate", "turn", "lift")):
            assert kernel["products"] > 0, kernel
        if kernel["aligned"] and kernel["kind"] < 3:  # 16 bytes in an instruction
            assert kernel["vector_reads"] >= 4, kernel
            assert kernel["vector_writes"] >= 1 or "lift" not in kernel["kernel"]


@pytest.mark.parametrize(
    ("operator", "blocks"),
    [
        ("srht", "sum_blocks"),
        ("affd", "sum_long_blocks"),
        pytest.param("fjl", "sum_long_blocks", marks=pytest.mark.full),
    ],
)
def test_steps_are_bound_once_and_compiled_once(operator, blocks, tmp_path):
    """Neither other gradients nor other seeds nor loss scales need other programs."""
    found = run(tmp_path, "launched_nowhere", "90", operator)
    row = ["gather", blocks, "sum_matrices", "add_rows", "finish_row"]
    assert found["steps"] == [["gather", *row]] * 3
    assert found["programs"] == 5


def test_vectors_of_any_number_of_tokens_take_one_program(tmp_path):
    """One per dtype."""
    found = run(tmp_path, "turned_nowhere", "90")
    assert found == {"launches": 16, "programs": 2}
