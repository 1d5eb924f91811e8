"""Two runs in one folder: the second one is refused, and says who is first."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sketch import load_sketches
from hf_sketch.cli import main
from hf_sketch.store.header import Header
from hf_sketch.store.lock import take_lock
from hf_sketch.store.rows import PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import (
    GOLDEN,
    SKETCH,
    step_row,
    write_steps,
    write_store,
)

HOST = socket.gethostname()


def start_of(process):
    """The 22nd field of Linux's proc(5)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def hold(store, rank=0, host=HOST, process=None, started=None):
    """Leave the lock of a process; by default of pytest's parent, which is alive."""
    process = os.getppid() if process is None else process
    content = {
        "host": host,
        "process": process,
        "started": start_of(process) if started is None else started,
        "since": "2026-11-28 20:55:01.123456+00:00",
    }
    path = store.with_name(f"{store.name}-{rank:05d}.lock")
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "sketches")


def locks(store):
    return sorted(path.name for path in store.parent.glob("*.lock"))


def test_a_lock_is_there_while_a_writer_is(tmp_path):
    writer = SketchWriter(tmp_path / "sketches", Header(SKETCH))
    path = tmp_path / "sketches-00000.lock"
    content = json.loads(path.read_text())
    assert content.pop("since")[:2] == "20"
    own = {"process": os.getpid(), "started": start_of(os.getpid())}
    assert content == {"host": HOST, **own}
    writer.close()
    assert not locks(tmp_path / "sketches")


def test_a_second_run_is_refused_by_name_and_touches_nothing(store):
    hold(store)
    before = {path: path.read_bytes() for path in store.iterdir()}
    message = (
        rf"Cannot write to {store}: another run does \(process {os.getppid()} on "
        rf"{HOST}, since 2026-11-28 20:55:01\)\. Wait for it, end it, or pass another"
    )
    for resume_step in (0, 3):
        with pytest.raises(ValueError, match=message) as raised:
            SketchWriter(store, Header(SKETCH), resume_step)
        assert "delete" not in str(raised.value)
    for command in ("repair", "upgrade"):
        with pytest.raises(ValueError, match=message):
            main([command, str(store)])
    assert {path: path.read_bytes() for path in store.iterdir()} == before
    assert [path.name for path in store.parent.iterdir() if path.is_dir()] == [
        "sketches"
    ]
    assert len(load_sketches(store)) == 6  # whoever only reads needs no lock


def test_a_run_goes_on_where_one_on_another_machine_was_killed(store):
    """As a scheduler does after it has ended a run."""
    path = hold(store, host="node-7", process=1, started="0")
    with pytest.warns(
        UserWarning, match="from another run: process 1 on node-7, since"
    ):
        write_steps(store, [4], Header(SKETCH, row_dtype="float16"), resume_step=3)
    assert load_sketches(store).steps["step"][:] == [1, 2, 3, 4]
    assert not path.exists()


def test_a_command_leaves_a_lock_of_another_machine_alone(store):
    path = hold(store, host="node-7", process=1, started="0")
    with pytest.raises(ValueError, match="process 1 on node-7") as raised:
        main(["repair", str(store)])
    assert str(raised.value).endswith(f"If that process is gone, delete {path}.")


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_whose_lock_was_taken_over_names_no_file(tmp_path, ended):
    """Nor overwrites one of the run that has it now."""
    store = tmp_path / "sketches"
    writer = SketchWriter(store, Header(SKETCH))
    writer.append(PER_STEP, step_row(1))
    writer.flush()
    path = hold(store, host="node-7", process=1, started="0")
    if ended:
        path.unlink()
    before = {path: path.read_bytes() for path in store.iterdir()}
    writer.append(PER_STEP, step_row(2))
    who = "" if ended else ", process 1 on node-7, since 2026-11-28 20:55:01"
    message = rf"after step 1 .*another process writes there{who}\)\. Pass another"
    with pytest.raises(OSError, match=message):
        writer.flush()
    writer.close()
    assert {path: path.read_bytes() for path in store.iterdir()} == before


@pytest.mark.parametrize("kind", ["dead", "reused", "own", "empty", "cut"])
def test_a_stale_lock_is_taken_over(store, kind):
    if kind == "dead":
        ended = subprocess.Popen([sys.executable, "-c", ""])
        started = start_of(ended.pid)
        ended.wait()
        path = hold(store, process=ended.pid, started=started)
    elif kind == "reused":  # the number is that of a later process
        path = hold(store, started="1")
    else:
        path = hold(store, process=os.getpid())
        if kind in ("empty", "cut"):
            path.write_bytes(path.read_bytes()[: {"empty": 0, "cut": 9}[kind]])
    write_steps(store, [4], Header(SKETCH, row_dtype="float16"), resume_step=3)
    assert load_sketches(store).steps["step"][:] == [1, 2, 3, 4]
    assert not locks(store)


def test_a_process_that_was_killed_and_not_yet_waited_for_is_gone(store):
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(zombie.pid)
    hold(store, process=zombie.pid, started=started)
    with pytest.raises(ValueError, match=f"process {zombie.pid} on"):
        take_lock(store, 0)
    zombie.kill()
    while "Z" not in Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2]:
        pass
    take_lock(store, 0).release()
    zombie.communicate()


def test_an_abandoned_writer_of_this_process_leaves_the_next_one_its_lock(tmp_path):
    """As in a notebook where training was interrupted."""
    first = SketchWriter(tmp_path / "sketches", Header(SKETCH))
    second = SketchWriter(tmp_path / "sketches", Header(SKETCH))
    first.close()
    assert locks(tmp_path / "sketches") == ["sketches-00000.lock"]
    second.close()
    assert not locks(tmp_path / "sketches")


def test_a_store_that_is_refused_is_not_locked(store):
    with pytest.raises(ValueError, match="its rows were made with"):
        SketchWriter(store, Header(SKETCH, loss="sum"), 3)
    assert not locks(store)


def test_each_process_of_a_run_has_its_own_lock(tmp_path):
    store = tmp_path / "sketches"
    settings = {"world_size": 2}
    first = SketchWriter(store, Header(SKETCH), **settings)
    path = hold(store)  # as another process of the run has it
    second = SketchWriter(store, Header(SKETCH), rank=1, **settings)
    assert locks(store) == ["sketches-00000.lock", "sketches-00001.lock"]
    path.unlink()
    second.close()
    first.close()


def test_locks_of_other_ranks_are_theirs(store):
    """As their processes may go on where one training failed and another begins."""
    path = hold(store, rank=3)
    SketchWriter(store, Header(SKETCH, row_dtype="float16"), 3).close()
    assert locks(store) == [path.name]


def test_locks_are_not_part_of_a_store(tmp_path):
    shutil.copytree(GOLDEN[2], tmp_path / "sketches")
    before = sorted(path.name for path in (tmp_path / "sketches").iterdir())
    writer = SketchWriter(tmp_path / "sketches", Header(SKETCH, row_dtype="float16"), 3)
    assert sorted(p.name for p in (tmp_path / "sketches").iterdir()) == before
    writer.close()


RACE = """
import os, sys, time
from pathlib import Path
from hf_sketch.store.lock import take_lock
from hf_sketch.store.rows import PER_STEP
store = Path(sys.argv[1])
ended = os.fork()
if not ended:
    take_lock(store, 0)
    os._exit(0)
os.waitpid(ended, 0)
start = time.monotonic() + 0.3
children = []
for _ in range(12):
    child = os.fork()
    if not child:
        while time.monotonic() < start:
            pass
        try:
            take_lock(store, 0)
        except ValueError:
            os._exit(1)
        time.sleep(1)
        os._exit(0)
    children.append(child)
print(sum(os.waitpid(child, 0)[1] == 0 for child in children))
"""


def test_one_of_many_processes_takes_a_stale_lock(tmp_path):
    for number in range(3):
        command = [sys.executable, "-c", RACE, str(tmp_path / f"sketches-{number}")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.stdout == "1\n", run.stderr
