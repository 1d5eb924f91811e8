import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_row_is_lost_to_kill_9():
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.crash", "--kills", "40"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "every row is there, once and whole" in run.stdout
