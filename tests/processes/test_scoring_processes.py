"""Several processes share a store's rows and find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sketch.attribution.record import FILE
from hf_sketch.attribution.shares import RowShare
from hf_sketch.cli import main
from tests.helpers.processes.joint_scoring import answers, in_blocks_of_four, store
from tests.helpers.processes.launching import ACCELERATE, TORCHRUN, in_two_and_four
from tests.helpers.trained.text_classifier import trained_classifier

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture
def blocks_of_four():
    with in_blocks_of_four():
        yield


@pytest.mark.usefixtures("blocks_of_four")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_are_all_rows_in_order_and_begin_where_blocks_do(count):
    dataset = store().dataset
    shares = [RowShare(dataset, number, count) for number in range(count)]
    rows = [row for share in shares for row in share.rows]
    assert rows == list(range(len(dataset)))
    assert all(share.rows.start % 4 == 0 for share in shares if share.rows)
    read = [block.start for share in shares for block in share.blocks()]
    assert read == [block.start for block in RowShare(dataset).blocks()]


def run(launcher, processes, *words):
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(processes), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def alone():
    with in_blocks_of_four():
        return answers(store())


@pytest.mark.usefixtures("blocks_of_four")
def test_one_process_alone_may_split_too(alone):
    check_answers(answers(store().over_processes()), alone)


@in_two_and_four("joint/scores")
def test_all_answers_are_those_of_one_process(launched, processes, alone):
    for rank in range(processes):
        check_answers(torch.load(launched / "scores" / f"answers-{rank}.pt"), alone)


def check_answers(found, alone):
    """Equal to the last bit, but for sums, whose order differs."""
    assert alone["lines"]["example_id"][14:17] == [102, 109, 118]  # equal: the first
    for name in ("lines", "cosine"):
        assert found[name] == alone[name]
    for name in ("scores", "own"):
        both = found[name].nan_to_num(7.0), alone[name].nan_to_num(7.0)
        assert torch.equal(*both)
    assert torch.allclose(found["sums"], alone["sums"], rtol=1e-12)
    assert found["groups"]["label"] == alone["groups"]["label"]
    assert found["groups"]["score"] == pytest.approx(alone["groups"]["score"], 1e-12)
    assert found["warnings"] == alone["warnings"]
    assert len(found["warnings"]) == 5
    assert all(message.startswith("Skipped 1 rows") for message in found["warnings"])


@pytest.mark.full
@pytest.mark.parametrize("method", ["dot", "tracin"])
def test_the_command_answers_the_same_in_several_processes(method, tmp_path):
    directory = trained_classifier(tmp_path, 2**18)  # three blocks of rows
    words = [
        "attribute",
        str(directory / "out"),
        f"--queries={directory / 'queries.jsonl'}",
        f"--model={directory / 'model'}",
        f"--method={method}",
    ]
    main(words)
    expected = json.loads((directory / "out" / FILE).read_text())
    for launcher, processes in ((ACCELERATE, 2), (TORCHRUN, 4)):
        file = directory / f"{processes}.json"
        command = ("-m", "hf_sketch.cli", *words, f"--output_file={file}")
        done = run(launcher, processes, *command)
        assert done.stdout.count("saved") == 1
        assert_close(json.loads(file.read_text()), expected)


def assert_close(got, expected):
    """Equal, numbers up to rounding: queries' gradients depend on the threads."""
    if isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(got[key], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)
    else:
        assert got == expected
