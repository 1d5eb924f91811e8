import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.full)])
def test_no_row_is_lost_to_kill_9(kills):
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.trained.crash", "--kills", str(kills)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "every row is there, once and whole" in run.stdout
