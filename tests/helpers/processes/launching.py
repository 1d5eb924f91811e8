"""Starting training in several processes, and reading what it leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers.utils import logging

from hf_sketch.processes import end_group

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",  # or it starts one process; the script itself stays on the CPU
    "--main_process_port=0",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--num_processes",
)
_LONGEST_SECONDS = 1800  # all scenarios, on a machine that is busy with other work


def in_two_and_four(*scenarios):
    """Marks a test of what two processes leave; in the full tier also of four."""
    two, four = (pytest.mark.in_processes(count, *scenarios) for count in (2, 4))
    params = [
        pytest.param(2, marks=two),
        pytest.param(4, marks=[four, pytest.mark.full]),
    ]
    return pytest.mark.parametrize("processes", params)


def launch(processes, directory, scenarios, **options):
    """Run scenarios, one after the other, each in all processes."""
    code, errors, _ = run_together(processes, directory, scenarios, **options)
    assert code == 0, errors[-5000:]
    return directory


def run_together(
    processes,
    directory,
    scenarios,
    launcher=TORCHRUN,
    module="tests.helpers.processes.scenarios",
):
    """As `launch`, though processes may fail; (exit code, standard error, seconds)."""
    module = ("--module", module, str(directory), *scenarios)
    started = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(processes), *module],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = run.communicate(timeout=_LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        run.terminate()  # the launcher ends its processes, which killing it would not
        _, errors = run.communicate()
        errors += f"\nended after {_LONGEST_SECONDS} s, which was too long"
    return run.returncode, errors, time.monotonic() - started


def run_scenarios(scenarios):
    """What each process does: the scenarios that its command line names."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    top = Path(sys.argv[1])
    for name in sys.argv[2:]:
        (top / name).mkdir(parents=True, exist_ok=True)
        with patch.dict(os.environ):  # the Trainer leaves its settings there
            scenarios[name](top / name)
    end_group()
    # FSDP's meshes keep the group's threads, which abort an interpreter that ends when
    # they ask for it: https://github.com/pytorch/pytorch/issues/190489.
    sys.stderr.flush()
    os._exit(0)


def results(directory, name, processes=2):
    """What each process left under a name."""
    paths = [directory / f"{name}-{rank}.json" for rank in range(processes)]
    return [json.loads(path.read_text()) for path in paths]


def assert_bit_equal_training(launched, *scenarios):
    """Two processes trained as the scenario "plain" did, to the last bit."""
    for scenario in scenarios:
        assert results(launched / "plain", "curve") == results(
            launched / scenario, "curve"
        )
        for rank in (0, 1):
            plain, watched = (
                torch.load(launched / name / f"weights-{rank}.pt")
                for name in ("plain", scenario)
            )
            assert all(torch.equal(plain[name], watched[name]) for name in plain)
