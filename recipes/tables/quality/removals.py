"""How often the intervals of `what_if` hold what retraining without examples does."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import CounterRandom, GradientRows, ModelSketch
from hf_sketch.attribution.evaluation import correlations
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.tables.paper.saved_losses import SavedLosses
from hf_sketch.recipes.tables.quality.lds import task_of
from hf_sketch.recipes.tables.quality.lds_methods import sketched
from hf_sketch.recipes.tables.quality.lds_options import (
    LdsArguments,
    TaskArguments,
    of_task,
)
from hf_sketch.recipes.tables.quality.lds_training import Task

_TINY = {"rows": 40, "queries": 6, "removals": 9, "seeds": 2, "epochs": 1}
_TINY |= {"out_size": 64}
SETTINGS = {"digits": {"epochs": 30}, "snli_head": {"epochs": 3}}
_LEAST, _MOST = 0.001, 0.3  # parts of the rows that are removed
_SMALL = 0.01  # below it retraining differs by its noise alone, nearly
_NORMAL = 1.645  # standard deviations to both sides of a 90% interval
_KINDS = ("random", "label", "proponents")


@dataclass
class RemovalsArguments(TaskArguments):
    """Coverage of the intervals of what_if, against models retrained without examples.

    A third of the removals is random, a third begins with the rows of one label, a
    third are the strongest proponents of a query. Their sizes go from 0.1% to 30%.
    """

    removals: int = field(default=210, metadata={"help": "Sets that are removed."})
    seeds: int = field(default=3, metadata={"help": "Models of each; losses' mean."})
    out_size: int = field(default=1024, metadata={"help": "Numbers in a sketch."})


def removed_sets(scores: Tensor, labels: Tensor, count: int) -> list[Tensor]:
    """Sets of rows to remove, of each kind in turn, from the smallest to the largest.

    Shapes:
        scores (queries, rows); labels (rows,)
    """
    rows = len(labels)
    parts = torch.logspace(-3, torch.tensor(_MOST).log10().item(), count)
    sets: list[Tensor] = []
    for number, part in enumerate(parts.tolist()):
        size = max(1, round(part * rows))
        order = CounterRandom(0, f"removal/{number}").permutation(rows)
        turn, kind = divmod(number, len(_KINDS))
        if _KINDS[kind] == "label":
            label = turn % (int(labels.max()) + 1)
            order = torch.cat([order[labels[order] == label], order])
            order = torch.tensor(list(dict.fromkeys(order.tolist())))
        elif _KINDS[kind] == "proponents":
            order = scores[turn % len(scores)].argsort(descending=True)
        sets.append(order[:size])
    return sets


@dataclass(frozen=True)
class Changes:
    """What was estimated and what came.

    Shapes:
        each (removals, queries + 1), of which the last is the mean over the queries

    Args:
        estimates: estimates of `what_if`.
        half_widths: half widths of its intervals.
        truths: changes of the losses, mean over the seeds.
        noise: standard errors of these means.
    """

    estimates: Tensor
    half_widths: Tensor
    truths: Tensor
    noise: Tensor

    def coverage(self, chosen: Tensor, noise: bool = True) -> dict[str, float]:
        """The share of truths within the intervals, of some removals.

        Args:
            chosen: (removals,), bool.
            noise: widen the intervals by that of the truths.
        """
        added = _NORMAL * self.noise if noise else torch.zeros_like(self.noise)
        width = (self.half_widths.square() + added.square()).sqrt()
        held = ((self.estimates - self.truths).abs() <= width)[chosen].double()
        return {
            "queries": float(held[:, :-1].mean()),
            "mean": float(held[:, -1].mean()),
        }

    def summary(self, chosen: Tensor) -> dict[str, Any]:
        """Coverage, slope and correlation of some removals."""
        if not bool(chosen.any()):
            return {"removals": 0}
        x, y = self.estimates[chosen, :-1].reshape(1, -1), self.truths[chosen, :-1]
        y = y.reshape(1, -1)
        return {
            "removals": int(chosen.sum()),
            "coverage": self.coverage(chosen),
            "coverage_without_noise": self.coverage(chosen, noise=False),
            "slope": float((x * y).sum() / x.square().sum()),
            "pearson_r": float(correlations(x, y)),
            "rms_change": float(y.square().mean().sqrt()),
            "median_half_width": float(self.half_widths[chosen, :-1].median()),
        }


def measure(task: Task, arguments: RemovalsArguments) -> dict[str, Any]:
    """Record, estimate, retrain and compare."""
    rows = torch.arange(len(task.rows))
    model = task.train(rows, 0)[-1].model
    sketch = ModelSketch.from_model(model, arguments.out_size)
    run = task.record(sketch)
    queries = sketched(task, model, task.queries, sketch)
    labels = torch.tensor([int(row["labels"]) for row in task.rows])
    scores = run.scores(queries, groups="example_id")
    sets = removed_sets(scores, labels, arguments.removals)
    estimates, half_widths = _estimated(run, queries, sets)
    changes = retrained(task, arguments, sets)
    truths = changes.mean(1)
    sizes = torch.tensor([len(some) for some in sets])
    small = sizes <= max(1, _SMALL * len(rows))
    errors = changes.std(1) / arguments.seeds**0.5
    noise = errors[small].square().mean(0).sqrt().expand_as(truths)
    found = Changes(estimates, half_widths, truths, noise)
    kinds = torch.arange(len(sets)) % len(_KINDS)
    edges = [0, 3, 10, 30, 100, len(rows)]
    return {
        "all": found.summary(sizes > 0),
        "by_size": {
            f"{low + 1} to {high}": found.summary((sizes > low) & (sizes <= high))
            for low, high in pairwise(edges)
        },
        "by_kind": {
            kind: found.summary(kinds == number) for number, kind in enumerate(_KINDS)
        },
        "noise": float(noise[0, :-1].mean()),
    }


def _estimated(
    run: GradientRows, queries: GradientRows, sets: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Estimates and half widths, (removals, queries + 1) each."""
    estimates: list[list[float]] = []
    half_widths: list[list[float]] = []
    for some in tqdm(sets, desc="Estimating", unit="removal"):
        found = run.what_if(some.tolist(), queries)
        lines = found.queries
        estimates.append([*lines["change"][:], found.change])
        ends = zip(lines["low"][:], lines["high"][:], strict=True)
        halves = [(high - low) / 2 for low, high in ends]
        half_widths.append([*halves, (found.high - found.low) / 2])
    return torch.tensor(estimates), torch.tensor(half_widths)


def retrained(task: Task, arguments: RemovalsArguments, sets: list[Tensor]) -> Tensor:
    """Return changes of the losses and of their mean by removal and training's seed.

    Shapes:
        returns (removals, seeds, queries + 1), float64
    """
    names = ("task", "train_file", "validation_file", "rows", "queries", "epochs")
    losses = SavedLosses(
        Path(arguments.output_dir) / f"removals_{arguments.task}_losses.json",
        {name: getattr(arguments, name) for name in names},
        lambda rows, seed: task.losses(task.train(rows, seed)[-1].model),
    )
    every, seeds = torch.arange(len(task.rows)), range(arguments.seeds)
    whole = torch.stack([losses(every, seed) for seed in seeds])
    changes: list[Tensor] = []
    for some in tqdm(sets, desc="Retraining", unit="removal"):
        stay = torch.ones(len(every), dtype=torch.bool)
        stay[some] = False
        without = [losses(every[stay], seed) for seed in seeds]
        changes.append(torch.stack(without) - whole)
    found = torch.stack(changes).double()
    return torch.cat([found, found.mean(2, keepdim=True)], 2)


def run_removals(arguments: RemovalsArguments) -> dict[str, Any]:
    """Measure, print and save.

    Raises:
        ValueError: the task is unknown.
    """
    arguments = of_task(arguments, _TINY, SETTINGS)
    results = measure(task_of(LdsArguments(**arguments.shared)), arguments)
    _print(results)
    name = f"removals_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _print(results: dict[str, Any]) -> None:
    print("coverage of 90% intervals: each query, mean over queries; slope; Pearson r")
    parts = {"all": results["all"], **results["by_size"], **results["by_kind"]}
    for name, found in parts.items():
        if found["removals"]:
            held = found["coverage"]
            print(
                f"  {name:12s} {found['removals']:4d} removals {held['queries']:.1%} "
                f"{held['mean']:.1%} {found['slope']:6.2f} {found['pearson_r']:6.2f}"
            )


if __name__ == "__main__":
    run_removals(*HfArgumentParser(RemovalsArguments).parse_args_into_dataclasses())
