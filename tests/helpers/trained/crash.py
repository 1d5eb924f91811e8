"""Kills training with the callback again and again, and resumes it: no row is lost.

Half of the kills come at a random time, the others before or after a random one of the
calls that put files in their place.

`python -m tests.helpers.trained.crash --kills 1000`
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.maintenance import find_problems
from tests.helpers.trained.training import tiny_dataset, tiny_trainer

_CALLS = ("replace", "fsync")
_MOST_KILLS_A_RUN = 4


@dataclass
class CrashArguments:
    """How often training is killed."""

    kills: int = field(default=40, metadata={"help": "Kills in all."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})


def train(directory, dies_at=None):
    """Train, from the newest whole checkpoint on; die at a call that is counted."""
    if dies_at is not None:
        die_at(*dies_at)
    checkpoint = newest_checkpoint(directory)
    callback = GradientSketchCallback(8, row_dtype="float16")
    trainer = tiny_trainer(
        directory, callback, dataset=tiny_dataset(12), logging_strategy="no"
    )
    trainer.train(resume_from_checkpoint=checkpoint)


def die_at(number, after):
    """Kill this process at its `number`-th call that puts a file in its place."""
    left = [number]

    def counted(call):
        def wrapped(*arguments, **named):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **named)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


def newest_checkpoint(directory):
    """The newest checkpoint that was written to its end; the others are removed."""
    whole = []
    for path in directory.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
            whole.append(path)
        except (FileNotFoundError, ValueError):
            shutil.rmtree(path)
    newest = max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    return None if newest is None else str(newest)


def rows_of(directory):
    """Return all rows, by their identity."""
    store = load_sketches(directory)
    rows = {}
    for kind, dataset in (("example", store.dataset), ("step", store.steps)):
        for row in dataset:
            key = kind, row["step"], row.get("micro_step"), row.get("example_id")
            assert key not in rows, f"{key} is there twice"
            rows[key] = row
    return rows


def check_opens(directory, reference):
    """What is there opens, and its rows are those of a run that was not killed."""
    if not (directory / "sketches").exists():
        return
    expected = rows_of(reference)
    for key, row in rows_of(directory).items():
        assert row == expected[key], key
    problems = find_problems(directory / "sketches")
    assert all("jsonl does not list" in problem for problem in problems), problems


def check_complete(directory, reference):
    """All rows are there."""
    assert rows_of(directory) == rows_of(reference)
    assert not find_problems(directory / "sketches")


def start(action, *arguments):
    """Run something in a process of its own, which starts in no time."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "'pin_memory' argument", UserWarning)
        # Killed between its first rows and its first checkpoint, training starts again.
        warnings.filterwarnings("ignore", ".*of a run that is not resumed")
        action(*arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(action, *arguments):
    """The same, to its end."""
    _, status = os.waitpid(start(action, *arguments), 0)
    if status:
        raise SystemExit(f"{action.__name__} of {arguments[0]} failed: {status}")


def kill_once(directory, moments, seconds):
    """Start training and kill it; False if it ended before."""
    if moments.random() < 0.5:
        dies_at = moments.randrange(1, 90), moments.random() < 0.5
        process = start(train, directory, dies_at)
    else:
        process = start(train, directory)
        time.sleep(moments.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"training in {directory} failed before it was killed")
    return os.WIFSIGNALED(status)


def main(arguments):
    """Kill, resume, compare; say how it went."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    moments = random.Random(arguments.seed)
    top = Path(mkdtemp())
    before = time.perf_counter()
    run(train, top / "reference")
    seconds = time.perf_counter() - before
    kills = runs = 0
    bar = tqdm(total=arguments.kills, desc="Killing", unit="kill")
    while kills < arguments.kills:
        directory = top / f"run-{runs}"
        for _ in range(moments.randint(1, _MOST_KILLS_A_RUN)):
            killed = kill_once(directory, moments, seconds)
            run(check_opens, directory, top / "reference")
            if not killed:
                break
            kills += 1
            bar.update()
        run(train, directory)
        run(check_complete, directory, top / "reference")
        shutil.rmtree(directory)
        runs += 1
    bar.close()
    shutil.rmtree(top)
    print(f"{kills} kills in {runs} runs: every row is there, once and whole")


if __name__ == "__main__":
    main(*HfArgumentParser(CrashArguments).parse_args_into_dataclasses())
