"""How well scores foretell what training on subsets does: the datamodeling score."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import ModelSketch
from hf_sketch.attribution.evaluation import (
    linear_datamodeling_score,
    random_subsets,
    retrain_on_subsets,
)
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.paper.saved_losses import SavedLosses
from hf_sketch.recipes.tables.quality.lds_methods import (
    How,
    Row,
    Scores,
    exact_scores,
    sketched_scores,
)
from hf_sketch.recipes.tables.quality.lds_peers import (
    PACKAGES,
    PeerStudy,
    installed,
    peer_scores,
)
from hf_sketch.recipes.tables.quality.lds_tasks import (
    Digits,
    Snli,
    SnliHead,
)
from hf_sketch.recipes.tables.quality.lds_training import Snapshot, Task
from hf_sketch.recipes.training_defaults import with_small

_SNLI = {
    "rows": 240,
    "queries": 40,
    "subsets": 50,
    "seeds": 1,
    "epochs": 3,
    "out_sizes": "1024,4096",
    "sketch_seeds": 1,
    "snapshots": 2,
    "krylov_dim": 20,
    "keep_vectors": 10,
    "hessian_rows": 16,
}
_TINY = {
    "rows": 24,
    "queries": 3,
    "subsets": 4,
    "seeds": 1,
    "epochs": 1,
    "out_sizes": "128",  # traker loses a projection matrix of at most 100 columns
    "sketch_seeds": 1,
    "snapshots": 1,
    "krylov_dim": 4,
    "keep_vectors": 2,
    "hessian_rows": 8,
    "dampings": "1",
    "influence_dampings": "0.1",
    "peer_dampings": "0.1",
    "hessian_dampings": "",
}
_SETTINGS = {"digits": {}, "snli_head": {"epochs": 3}, "snli": _SNLI}


@dataclass
class LdsArguments(ReportArguments):
    """Linear datamodeling scores (LDS) of this library's methods and of other packages.

    Models are trained anew on random halves of the training set; the LDS is the rank
    correlation, over these halves, of a query's losses with the sums of its scores.
    """

    task: str = field(
        default="digits",
        metadata={
            "help": "digits (a perceptron), snli_head (on the frozen MiniLM) or snli "
            "(all of MiniLM, smaller settings)."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows instead of our own pairs."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, for queries."}
    )
    rows: int = field(default=1000, metadata={"help": "Rows of the training set."})
    queries: int = field(default=200, metadata={"help": "Other rows to ask of."})
    epochs: int = field(default=30, metadata={"help": "Passes of each training."})
    subsets: int = field(default=100, metadata={"help": "Random halves trained on."})
    seeds: int = field(default=2, metadata={"help": "Models of each; losses' mean."})
    out_sizes: str = field(default="256,1024", metadata={"help": "Sketch sizes."})
    groups: str = field(
        default="1",
        metadata={"help": "Groups of layers that share a sketch's numbers; several."},
    )
    sketch_seeds: int = field(default=3, metadata={"help": "Sketches of each size."})
    dampings: str = field(
        default="10,3,1,0.3,0.1",
        metadata={"help": "Of the preconditioned score, in its unit; 1 by default."},
    )
    influence_dampings: str = field(
        default="0.3,0.1,0.03,0.01", metadata={"help": "Of influence."}
    )
    krylov_dim: int = field(default=40, metadata={"help": "Lanczos steps of it."})
    keep_vectors: int = field(default=20, metadata={"help": "Eigenvectors of it."})
    hessian_rows: int = field(default=1000, metadata={"help": "Rows of its Hessian."})
    snapshots: int = field(
        default=3, metadata={"help": "States of training of TracIn."}
    )
    peers: str = field(
        default="traker,dattri",
        metadata={"help": "Other packages, left out where they are not installed."},
    )
    peer_dampings: str = field(
        default="0,0.1,0.3,1,3,10",
        metadata={"help": "Of TRAK, as a part of the mean eigenvalue; 0 by default."},
    )
    hessian_dampings: str = field(
        default="0.03,0.01,0.003",
        metadata={
            "help": "Of dattri's dense Hessian, added to its diagonal. It takes "
            "gigabytes; none if empty."
        },
    )
    tiny: bool = field(default=False, metadata={"help": "A few rows, as a check."})


def settled(arguments: LdsArguments) -> LdsArguments:
    """With the defaults of the task.

    Raises:
        ValueError: the task is unknown.
    """
    if arguments.task not in _SETTINGS:
        raise ValueError(
            f"task must be one of {', '.join(_SETTINGS)}, got {arguments.task!r}: pass "
            "--task digits."
        )
    small = _TINY if arguments.tiny else _SETTINGS[arguments.task]
    return with_small(arguments, small)


def task_of(arguments: LdsArguments) -> Task:
    """The training that is repeated."""
    sizes = (arguments.rows, arguments.queries, arguments.epochs)
    if arguments.task == "digits":
        return Digits(*sizes)
    files = (arguments.train_file, arguments.validation_file)
    kind = SnliHead if arguments.task == "snli_head" else Snli
    return kind(*sizes, *files, num_hidden_layers=1 if arguments.tiny else None)


def ground_truth(task: Task, arguments: LdsArguments) -> tuple[Tensor, Tensor]:
    """Subsets of the rows and each query's loss after training on them."""
    names = ("task", "train_file", "validation_file", "rows", "queries", "epochs")
    saved = SavedLosses(
        Path(arguments.output_dir) / f"lds_{arguments.task}_losses.json",
        {name: getattr(arguments, name) for name in names},
        lambda rows, seed: task.losses(task.train(rows, seed)[-1].model),
    )
    subsets = random_subsets(arguments.subsets, arguments.rows)
    return subsets, retrain_on_subsets(saved, subsets, arguments.seeds)


def all_scores(
    task: Task, snapshots: list[Snapshot], arguments: LdsArguments
) -> Iterable[tuple[Row, Tensor]]:
    """Those of every line of the table, by sketch or projection once for each seed."""
    digits, model = isinstance(task, Digits), snapshots[-1].model
    sizes = _numbers(arguments.out_sizes, int)
    dampings = _numbers(arguments.dampings)
    gram = not isinstance(task, Snli)
    yield from exact_scores(task, model, dampings, gram)
    how = How(
        dampings,
        _numbers(arguments.influence_dampings),
        arguments.krylov_dim,
        arguments.keep_vectors,
        arguments.hessian_rows,
    )
    some = product(sizes, _numbers(arguments.groups, int))
    for (size, count), seed in product(some, range(arguments.sketch_seeds)):
        sketch = ModelSketch.from_model(model, size // count, seed=seed, groups=count)
        yield from sketched_scores(task, snapshots, sketch, how)
    if digits:
        ridges = (arguments.peer_dampings, arguments.hessian_dampings)
        study = PeerStudy(task, snapshots, *map(_numbers, ridges))
        yield from _peers(study, arguments)


def _peers(study: PeerStudy, arguments: LdsArguments) -> Scores:
    sizes = _numbers(arguments.out_sizes, int)
    for name in _numbers(arguments.peers, str):
        yield from peer_scores(name, study, sizes, arguments.sketch_seeds)


def measure(
    task: Task, arguments: LdsArguments
) -> tuple[dict[Row, list[float]], dict[Row, float], int]:
    """The mean LDS of each line, once for each sketch.

    Returns:
        these; the standard error of each line's mean, over the queries; the number of
        the model's elements.
    """
    subsets, losses = ground_truth(task, arguments)
    step = max(1, arguments.epochs // arguments.snapshots)
    epochs = range(arguments.epochs, 0, -step)[: arguments.snapshots]
    snapshots = task.train(torch.arange(arguments.rows), 0, epochs)
    found: dict[Row, list[Tensor]] = {}
    for row, scores in all_scores(task, snapshots, arguments):
        lds = linear_datamodeling_score(scores, subsets, losses)
        found.setdefault(row, []).append(lds)
    means = {row: [float(x.nanmean()) for x in lds] for row, lds in found.items()}
    errors = {
        row: float(torch.stack(lds).nanmean(0).std()) / len(lds[0]) ** 0.5
        for row, lds in found.items()
    }
    elements = sum(p.numel() for p in snapshots[-1].model.parameters())
    return means, errors, elements


def kept(found: dict[Row, list[float]]) -> dict[Row, float]:
    """What part of an exact method's LDS its sketches have, in the mean.

    Those of layer groups have another damping in each, and no exact counterpart.
    """
    parts: dict[Row, float] = {}
    for row, scores in found.items():
        exact = found.get(Row(f"exact {row.method}", None, row.damping))
        if exact and (row.damping is None or row.groups == 1):
            parts[row] = mean(scores) / mean(exact)
    return parts


def best_by_size(found: dict[Row, list[float]]) -> dict[int, dict[str, Row]]:
    """The best line of ours and of the others at each size."""
    best: dict[int, dict[str, Row]] = {}
    for row in sorted(found, key=lambda row: mean(found[row])):
        if row.out_size is not None:
            whose = "others" if row.method.startswith(tuple(PACKAGES)) else "ours"
            best.setdefault(row.out_size, {})[whose] = row
    return dict(sorted(best.items()))


def print_table(found: dict[Row, list[float]]) -> None:
    """Each line, and the best of each size."""
    print("mean LDS over the queries, mean over sketches (least..greatest)")
    parts = kept(found)
    for row, scores in found.items():
        size = "" if row.out_size is None else f"D = {row.out_size}"
        part = f"  {parts[row]:.1%} of exact" if row in parts else ""
        spread = f"({min(scores):.3f}..{max(scores):.3f})" if len(scores) > 1 else ""
        print(f"  {row!s:40s} {size:10s} {mean(scores):6.3f} {spread}{part}")
    for size, best in best_by_size(found).items():
        lines = [f"{mean(found[best[w]]):.3f} {w} ({best[w]})" for w in sorted(best)]
        print(f"best at D = {size}: {', '.join(reversed(lines))}")


def run_lds(arguments: LdsArguments) -> dict[str, Any]:
    """Retrain, score, print and save."""
    arguments = settled(arguments)
    task = task_of(arguments)
    found, errors, elements = measure(task, arguments)
    print_table(found)
    lines = [
        vars(row) | {"lds": scores, "standard_error": errors[row]}
        for row, scores in found.items()
    ]
    results = {"elements": elements, "peers": installed(), "lines": lines}
    name = f"lds_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _numbers(listed: str, kind: type = float) -> list[Any]:
    return [kind(number) for number in listed.split(",") if number]


if __name__ == "__main__":
    run_lds(*HfArgumentParser(LdsArguments).parse_args_into_dataclasses())
