"""Kills what writes a store at each call that makes its files last, and looks at it.

`python -m tests.helpers.killed_stores` stops at what is lost or wrong, if anything.
"""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import mkdtemp

from hf_sketch import load_sketches
from hf_sketch.store import log
from hf_sketch.store.compaction import LEAST_BYTES, compact
from hf_sketch.store.maintenance import find_problems, upgrade
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import GOLDEN, HEADER, example_rows, step_row

_CALLS = ("fsync", "replace", "unlink", "rename")
_SIDES = ("before", "after")


@dataclass(frozen=True)
class Case:
    """Work on a store.

    Args:
        start: makes the store.
        work: is killed; it calls its second argument after each step that it flushed.
        end: that it has after the work is done, or done again.
        least: steps that are never gone, besides those that the work has flushed.
    """

    start: Callable[[Path], object]
    work: Callable[[Path, Callable[[int], object]], object]
    end: list[int]
    least: list[int]


def die_at(number: int, side: str) -> None:
    """Kill this process before or after its `number`-th call."""
    left = [number]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == 0 and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **named)
            finally:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


def record(
    directory,
    steps,
    resume_step=0,
    done=lambda step: None,
    together=1,
    file_bytes=LEAST_BYTES,
):
    """Write steps, flushed one by one or several at a time."""
    writer = SketchWriter(directory, HEADER, resume_step, file_bytes=file_bytes)
    for step in steps:
        writer.append(PER_EXAMPLE, example_rows(step, [100 * step, 100 * step + 1]))
        writer.append(PER_STEP, step_row(step))
        if step % together == 0 or step == steps[-1]:
            writer.flush()
            done(step)
    writer.join_files()
    writer.close()


def compacted(directory, steps):
    """Write steps, flushed one by one, and join their files."""
    record(directory, steps, file_bytes=1)
    compact(directory)


def killed(work, directory, number, side):
    """Do the work in a process that dies; say what it flushed, and whether it died."""
    end, other = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(end)
            die_at(number, side)
            work(directory, lambda step: os.write(other, bytes([step])))
            status = 0
        finally:
            os._exit(status)
    os.close(other)
    with os.fdopen(end, "rb") as pipe:
        flushed = [*pipe.read()]
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), "it failed"
    return flushed, os.WIFSIGNALED(status)


def check(directory, expected, least):
    """Rows of some first steps are there, each once and as it was written."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = load_sketches(directory)
    steps = store.steps["step"][:]
    assert steps == expected[: len(steps)], steps
    assert len(steps) >= least, f"{steps} are there, {least} were flushed"
    examples = store.dataset.with_format("torch")[:]
    ids = [100 * step + more for step in steps for more in (0, 1)]
    assert examples["example_id"].tolist() == ids
    rows = (examples["sketch"].float() * examples["scale"][:, None]).tolist()
    for row, one, step in zip(rows, ids, examples["step"].tolist(), strict=True):
        assert row == [(one + 1) * place + step for place in range(4)]


def kill_everywhere(case: Case, top: Path, every: int) -> int:
    """Kill a case's work at its calls, and return how often that was."""
    kills = 0
    for number in count(1, every):
        for side in _SIDES:
            directory = top / "sketches"
            case.start(directory)
            flushed, died = killed(case.work, directory, number, side)
            kills += died
            least = len(case.least) + len(set(flushed) - set(case.least))
            check(directory, case.end, least if died else len(case.end))
            problems = find_problems(directory)
            assert all("does not list" in x for x in problems), problems
            case.work(directory, lambda step: None)
            check(directory, case.end, len(case.end))
            assert find_problems(directory) == []
            assert not list(directory.glob("*.json[!l]")), "a manifest of version 1"
            shutil.rmtree(directory)
        if not died:
            return kills
    raise AssertionError


CASES = {
    "append": Case(
        lambda to: record(to, [1, 2]),
        lambda to, done: record(to, [3, 4], 2, done),
        end=[1, 2, 3, 4],
        least=[1, 2],
    ),
    "snapshot": Case(
        lambda to: record(to, [1, 2]),
        lambda to, done: record(to, range(3, 7), 2, done),
        end=[*range(1, 7)],
        least=[1, 2],
    ),
    "resume within a file": Case(
        lambda to: record(to, range(1, 7), together=4),
        lambda to, done: record(to, [3, 4, 5, 6], 2, done),
        end=[*range(1, 7)],
        least=[1, 2],
    ),
    "upgrade": Case(
        lambda to: shutil.copytree(GOLDEN[1], to),
        lambda to, done: upgrade(to),
        end=[1, 2, 3],
        least=[1, 2, 3],
    ),
    "resume version 1": Case(
        lambda to: shutil.copytree(GOLDEN[1], to),
        lambda to, done: record(to, [3, 4], 2, done),
        end=[1, 2, 3, 4],
        least=[1, 2],
    ),
}


CASES |= {
    "compact": Case(
        lambda to: record(to, range(1, 7), file_bytes=1),  # stay apart
        lambda to, done: compact(to, 4000),
        end=[*range(1, 7)],
        least=[*range(1, 7)],
    ),
    "join while recording": Case(
        lambda to: record(to, [1, 2]),
        lambda to, done: record(to, range(3, 7), 2, done, file_bytes=2350),
        end=[*range(1, 7)],
        least=[1, 2],
    ),
    "join at the end": Case(
        lambda to: record(to, [1, 2]),
        lambda to, done: record(to, range(3, 7), 2, done),
        end=[*range(1, 7)],
        least=[1, 2],
    ),
    "resume within a compacted file": Case(
        lambda to: compacted(to, range(1, 5)),
        lambda to, done: record(to, [3, 4], 2, done),
        end=[1, 2, 3, 4],
        least=[1, 2],
    ),
}


def main(every: int) -> None:
    """Kill all cases at each call, or at some, and say how often."""
    for name, case in CASES.items():
        log._SNAPSHOT_ENTRIES = 3 if name == "snapshot" else 1000
        kills = kill_everywhere(case, Path(mkdtemp()), every)
        print(f"{name}: {kills} kills, no row is lost")  # noqa: T201 - a report


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1)
