"""How well scores foretell what training on subsets does: the datamodeling score."""

from collections.abc import Iterable
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
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.tables.paper.saved_losses import SavedLosses
from hf_sketch.recipes.tables.quality.lds_language import LanguageModel
from hf_sketch.recipes.tables.quality.lds_methods import (
    How,
    Row,
    Scores,
    exact_scores,
    same_labels,
    sketched_scores,
)
from hf_sketch.recipes.tables.quality.lds_options import LdsArguments, settled
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


def task_of(arguments: LdsArguments) -> Task:
    """The training that is repeated."""
    sizes = (arguments.rows, arguments.queries, arguments.epochs)
    if arguments.task == "digits":
        return Digits(*sizes)
    files = (arguments.train_file, arguments.validation_file)
    if arguments.task == "language":
        given = (arguments.model_name_or_path, *files)
        if None in given:
            raise ValueError(
                "The task language needs --model_name_or_path, --train_file and "
                f"--validation_file, got {given}. Pass all three."
            )
        return LanguageModel(*sizes, *map(str, given))
    kind = SnliHead if arguments.task == "snli_head" else Snli
    return kind(*sizes, *files, num_hidden_layers=1 if arguments.tiny else None)


def ground_truth(task: Task, arguments: LdsArguments) -> tuple[Tensor, Tensor]:
    """Subsets of the rows and each query's loss after training on them."""
    files = ("model_name_or_path", "train_file", "validation_file")
    names = ("task", *files, "rows", "queries", "epochs")
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
    if not isinstance(task, LanguageModel):
        yield Row("same label"), same_labels(task)
    sizes = _numbers(arguments.out_sizes, int)
    dampings = _numbers(arguments.dampings)
    gram = not isinstance(task, (Snli, LanguageModel))
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
) -> tuple[dict[Row, list[float]], dict[Row, float], int, float]:
    """The mean LDS of each line, once for each sketch.

    Returns:
        these; the standard error of each line's mean, over the queries; the number of
        the model's elements; the mean loss of the queries after all trainings.
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
    return means, errors, elements, float(losses.mean())


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
    found, errors, elements, mean_loss = measure(task, arguments)
    print_table(found)
    lines = [
        vars(row) | {"lds": scores, "standard_error": errors[row]}
        for row, scores in found.items()
    ]
    results = {
        "elements": elements,
        "mean_loss": mean_loss,
        "peers": installed(),
        "lines": lines,
    }
    name = f"lds_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _numbers(listed: str, kind: type = float) -> list[Any]:
    return [kind(number) for number in listed.split(",") if number]


if __name__ == "__main__":
    run_lds(*HfArgumentParser(LdsArguments).parse_args_into_dataclasses())
