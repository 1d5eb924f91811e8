"""Stores that were made to do harm open or are refused, and harm nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_hostile_stores_crash_and_hang_and_exhaust_nothing(count):
    command = [sys.executable, "-m", "tests.helpers.hostile_stores", "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{count} cases\n", done.stdout + done.stderr
