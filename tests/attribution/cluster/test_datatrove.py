"""The script of docs/scale.md, killed and run again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from hf_sketch import load_sketches
from hf_sketch.store.rows import PER_EXAMPLE
from hf_sketch.store.writer import SketchWriter
from tests.helpers.rows_in_memory import random_matrix, rows_of
from tests.helpers.stores import HEADER, SKETCH, example_rows

pytest.importorskip("datatrove")
ROOT = Path(__file__).parents[3]
EXAMPLES, EPOCHS, TASKS = 12, 2, 6
# As the script imports what it runs, its blocks are small and its tasks slow.
SLOWED = """
import time
import hf_sketch.store.blocks
hf_sketch.store.blocks._BLOCK_ELEMENTS = 4 * 4

def pause(data, rank, world_size):
    time.sleep({seconds} * (rank > 1))
    return data
"""


@pytest.fixture
def shared(tmp_path):
    """What machines share: a store, and queries of its map."""
    writer = SketchWriter(tmp_path / "out" / "sketches", HEADER)
    for step in range(EPOCHS * EXAMPLES // 4):
        ids = [(4 * step + i) % EXAMPLES for i in range(4)]
        rows = {**example_rows(step + 1, ids), "sketch": random_matrix(4, step)}
        writer.append(PER_EXAMPLE, rows)
        writer.flush()
    writer.close()
    queries = rows_of(random_matrix(3, 100), SKETCH)
    queries.dataset.save_to_disk(tmp_path / "queries")
    return tmp_path


def start(shared, seconds):
    page = (ROOT / "docs" / "scale.md").read_text()
    (script,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    for old, new in {
        "/shared": str(shared),
        "tasks=64": f"tasks={TASKS}",
        "min(8,": "min(2,",
        "[stage.task]": "[pause, stage.task]",
        "\nif __name__": f"{SLOWED.format(seconds=seconds)}\nif __name__",
    }.items():
        assert script.count(old) >= 1, old
        script = script.replace(old, new)
    (shared / "score.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "score.py"],
        cwd=shared,
        env={**os.environ, "HF_DATASETS_CACHE": str(shared), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_job_goes_on_with_the_tasks_that_are_left(shared):
    run = start(shared, seconds=600)
    done = shared / "answers" / "logs" / "covariance" / "0" / "completions"
    deadline = time.monotonic() + 300
    while len([*done.glob("*")]) < 2:  # the next two sleep
        assert run.poll() is None, run.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    complete = {path.name for path in done.glob("*")}
    assert complete == {"00000", "00001"}
    parts = shared / "answers" / "covariance" / "0"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert sorted(before) == ["000000.parquet", "000001.parquet"]

    again = start(shared, seconds=0)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-3000:]
    after = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert len(after) == TASKS
    assert before.items() <= after.items()  # not written again

    found = parquet.read_table(shared / "answers" / "answers.parquet").to_pydict()
    expected, scores = best_examples(shared)
    assert found["example_id"] == expected.flatten().tolist()
    np.testing.assert_allclose(found["score"], scores.flatten(), rtol=1e-5)


def best_examples(shared):
    """The default method's answer by its formula, in float64."""
    table = load_sketches(shared / "out").dataset.with_format("numpy")[:]
    rows = table["sketch"].astype(np.float64) * table["scale"][:, None]
    covariance = torch.from_numpy(rows.T @ rows / len(rows))
    added = covariance.trace() / EXAMPLES * torch.eye(4, dtype=torch.float64)
    queries = random_matrix(3, 100).double().numpy()
    scores = queries @ np.linalg.solve((covariance + added).numpy(), rows.T)
    ids = table["example_id"]
    sums = np.stack([scores[:, ids == i].sum(1) for i in range(EXAMPLES)], 1)
    order = sums.argsort(1)[:, ::-1][:, :10]
    return order, np.take_along_axis(sums, order, 1)
