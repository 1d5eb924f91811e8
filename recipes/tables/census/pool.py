"""Cases judged in processes of their own, a few at a time."""

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
import transformers

from hf_sketch.recipes.tables.census.judge import Verdict, judge
from hf_sketch.recipes.tables.census.tasks import Case


@dataclass(frozen=True)
class _Running:
    """A case on its way."""

    case: Case
    process: BaseProcess
    results: Connection
    deadline: float

    @property
    def has_ended(self) -> bool:
        done = self.results.poll() or not self.process.is_alive()
        return done or time.monotonic() > self.deadline


def judged(cases: Iterable[Case], workers: int, limit: float) -> Iterator[Verdict]:
    """Yield the verdict of every case, in the order in which they end.

    Args:
        cases: the cases to judge.
        workers: number of processes at a time.
        limit: seconds after which a case counts as "timeout".
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # a fork costs less than the imports
    waiting, running = list(cases), list[_Running]()
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(case, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append(_Running(case, process, ours, time.monotonic() + limit))
        wait([one.results for one in running], timeout=min(1.0, limit))
        for one in [one for one in running if one.has_ended]:
            running.remove(one)
            yield _verdict(one)


def work(case: Case, results: Connection) -> None:
    """Judge a case in this process, and send the verdict."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results.send(asdict(judge(case)))


def _verdict(one: _Running) -> Verdict:
    """Return what a process sent, or why it sent nothing."""
    case, found = one.case, None
    late = one.process.is_alive()
    if one.results.poll():
        try:
            found = Verdict(**one.results.recv())
        except EOFError:  # it died
            late = False
    one.process.kill()
    one.process.join()
    one.results.close()
    if found is not None:
        return found
    if late:
        return Verdict(case.task, case.kind, case.name, "timeout", "out of time")
    reason = f"its process ended with {one.process.exitcode}"
    return Verdict(case.task, case.kind, case.name, "crash", reason)
