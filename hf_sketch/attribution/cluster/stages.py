"""Attribution as stages of tasks, for datatrove or any other engine to run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from datasets.fingerprint import Hasher
from torch import Tensor

from hf_sketch.attribution.answers import check_lines
from hf_sketch.attribution.cluster.files import StoreFiles
from hf_sketch.attribution.cluster.folder import TaskFolder
from hf_sketch.attribution.cluster.work import (
    CovarianceSums,
    Question,
    Work,
    moments_of,
    work_of,
)
from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.covariance import example_count
from hf_sketch.attribution.methods import Method, Preconditioned, check_damping
from hf_sketch.attribution.queries import query_matrix
from hf_sketch.model.groups import Layers
from hf_sketch.sketches.choices import check_count

ANSWERS: Final = "answers.parquet"
_COVARIANCE: Final = "covariance.parquet"
_JOB: Final = "job.txt"


@dataclass(frozen=True, eq=False)
class SavedCovariance(Method):
    """`Preconditioned`, with the covariance that an earlier stage has left in a file.

    Args:
        folder: folder of the tasks.
        shape: shape of a row, see `covariance`.
        examples: number of different examples.
        damping: see `Preconditioned`.
    """

    folder: TaskFolder
    shape: tuple[int, ...]
    examples: int
    damping: float

    def transform(self, sketches: Tensor) -> Tensor:
        return self._method.transform(sketches)

    @cached_property
    def _method(self) -> Preconditioned:
        table = self.folder.read_table(_COVARIANCE)
        mean = moments_of(table, self.shape).mean
        return Preconditioned(mean, self.examples, self.damping)


@dataclass(frozen=True, eq=False, repr=False)
class PartTask:
    """Do some work on one part of the rows.

    Engines call it as `task(data, rank, world_size)`; `data` is passed on.

    Args:
        work: the work.
        rows: rows of the store.
        folder: where results go.
        output: name of the results' folder.
    """

    work: Work
    rows: StoreFiles
    folder: TaskFolder
    output: str

    def __call__(self, data: object, rank: int, world_size: int) -> object:
        with self.rows.part(rank, world_size) as rows:
            result = self.work.of_rows(rows)
        self.folder.write_table(_part(self.output, rank), result)
        return data


@dataclass(frozen=True, eq=False, repr=False)
class JoinTask:
    """Join the results of some parts into one.

    Args:
        work: the work.
        folder: where results are.
        source: name of the results' folder.
        parts: number of results there.
        output: name of the new results' folder; of a file if `last`.
        last: whether one task joins all of them, and finishes the work.
    """

    work: Work
    folder: TaskFolder
    source: str
    parts: int
    output: str
    last: bool

    def __call__(self, data: object, rank: int, world_size: int) -> object:
        mine = range(
            rank * self.parts // world_size, (rank + 1) * self.parts // world_size
        )
        names = (_part(self.source, number) for number in mine)
        joined = self.work.joined(map(self.folder.read_table, names))
        if self.last:
            self.folder.write_table(self.output, self.work.finished(joined))
        else:
            self.folder.write_table(_part(self.output, rank), joined)
        return data


@dataclass(frozen=True)
class Stage:
    """Tasks that may run at once, on any machines.

    Args:
        task: called as `task(None, rank, tasks)` for each rank: a step of a pipeline of
            datatrove.
        tasks: their number.
        logs: where the engine keeps which tasks are complete.
    """

    task: PartTask | JoinTask
    tasks: int
    logs: str


def attribution_stages(
    store: GradientRows,
    queries: GradientRows | Mapping[int, GradientRows],
    folder: str | Path,
    tasks: int,
    top_k: int = 10,
    method: str | Method = "preconditioned",
    *,
    bottom_k: int = 0,
    groups: str | None = "example_id",
    layers: Layers | None = None,
    damping: float = 1.0,
    url: str | None = None,
    joined_at_once: int = 64,
) -> list[Stage]:
    """Plan `store.attribute(queries, ...)` as stages of independent tasks.

    An engine runs one stage after the other; tasks of a stage need nothing of each
    other. A task that runs again writes the same file. The last stage leaves the answer
    in `answers.parquet` in the folder: the lines of `attribute`. docs/scale.md has an
    example.

    Args:
        store: as `load_sketches` returns it, in a directory that all machines reach,
            or see `url`.
        queries: see `attribute`.
        folder: for results and logs, a directory that all machines reach, or a URL.
        tasks: number of tasks that read rows, each a part; fewer if there are fewer
            blocks of rows.
        top_k: see `attribute`.
        method: see `attribute`; one stage more takes the covariance of
            "preconditioned".
        bottom_k: see `attribute`.
        groups: see `attribute`. None needs no sums over the rows of an example.
        layers: see `attribute`.
        damping: damping of "preconditioned".
        url: address of the store, from which tasks then copy the files they read.
        joined_at_once: results that one task joins; more of them are joined as a tree.

    Raises:
        TypeError: the queries are not sketched.
        ValueError: the folder holds another job, the rows are not whole files, or see
            `attribute`.
    """
    check_lines(top_k, bottom_k)
    check_count("tasks", tasks)
    check_count("joined_at_once", joined_at_once, 2)
    check_damping(damping)
    files, place = StoreFiles.of_store(store, url), TaskFolder.at(folder)
    tasks, examples = min(tasks, files.blocks), example_count(store.dataset)
    ids, matrix = query_matrix(store, queries)
    stages: list[Stage] = []
    if method == "preconditioned":
        shape = tuple(store.model_sketch.layer_groups.shape)
        method = SavedCovariance(place, shape, examples, damping)
        sums = CovarianceSums(shape)
        stages += _passes(sums, files, place, _COVARIANCE, tasks, joined_at_once)
    question = Question(ids, matrix, store.scored_by(method, layers), top_k, bottom_k)
    work = work_of(question, groups, store.dataset, examples)
    stages += _passes(work, files, place, ANSWERS, tasks, joined_at_once)
    _check_job(place, stages)
    return stages


def _passes(
    work: Work,
    files: StoreFiles,
    folder: TaskFolder,
    output: str,
    tasks: int,
    at_once: int,
) -> Iterator[Stage]:
    """A stage over the rows, and those that join its results."""
    name = output.partition(".")[0]
    level = 0
    source = f"{name}/{level}"
    logs = folder.path("logs")
    yield Stage(PartTask(work, files, folder, source), tasks, f"{logs}/{source}")
    last = False
    while not last:
        parts, tasks, level = tasks, -(-tasks // at_once), level + 1
        last = tasks == 1
        target = output if last else f"{name}/{level}"
        join = JoinTask(work, folder, source, parts, target, last)
        yield Stage(join, tasks, f"{logs}/{name}/{level}")
        source = target


def _check_job(folder: TaskFolder, stages: list[Stage]) -> None:
    """Note the job in the folder, or raise if another one has left results there."""
    job = Hasher.hash([(stage.task, stage.tasks) for stage in stages]).encode()
    if folder.read(_JOB) not in (None, job):
        raise ValueError(
            f"{folder.root} holds results for other queries, rows or settings. Pass a "
            "new folder, or the same arguments to go on."
        )
    folder.write(_JOB, job)


def _part(folder: str, number: int) -> str:
    """The name of a task's result."""
    return f"{folder}/{number:06d}.parquet"
