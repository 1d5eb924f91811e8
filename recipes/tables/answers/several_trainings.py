"""What averaging scores over several trainings gains, and what their spread covers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch, combine_scores
from hf_sketch.attribution.evaluation import linear_datamodeling_score
from hf_sketch.attribution.questions.trainings import CombinedScores
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.tables.quality.lds import ground_truth, task_of
from hf_sketch.recipes.tables.quality.lds_methods import sketched
from hf_sketch.recipes.tables.quality.lds_options import (
    LdsArguments,
    TaskArguments,
    of_task,
)
from hf_sketch.recipes.tables.quality.lds_training import Task
from hf_sketch.recipes.tables.quality.removals import (
    SETTINGS,
    RemovalsArguments,
    removed_sets,
    retrained,
)

_TINY = {"rows": 40, "queries": 6, "subsets": 4, "removals": 6, "trainings": 6}
_TINY |= {"epochs": 1, "out_size": 64}
# Standard errors to both sides of a 90% interval for the mean of a number of trainings.
_STUDENT = {3: 2.920, 5: 2.132}
_COUNTS = (1, *_STUDENT)
_METHODS = ("preconditioned", "tracin")
_NORMAL = 1.645  # the same for a Gaussian of known spread
_FIRST_SEED = 100  # beyond those of the truth


@dataclass
class SeveralTrainingsArguments(TaskArguments):
    """Datamodeling scores of one, three and five trainings, and what the spread covers.

    No recorded training has the seed of a training that is the truth. The baseline is
    that number of sketches of one training, at the same bytes.
    """

    subsets: int = field(default=100, metadata={"help": "Random halves trained on."})
    removals: int = field(default=90, metadata={"help": "Sets that are removed."})
    seeds: int = field(default=3, metadata={"help": "Retrainings; losses' mean."})
    trainings: int = field(default=15, metadata={"help": "Recorded trainings."})
    out_size: int = field(default=1024, metadata={"help": "Numbers in a sketch."})


def recorded_scores(
    task: Task, out_size: int, seeds: list[tuple[int, int]]
) -> dict[str, CombinedScores]:
    """By method, the scores of trainings of some seeds, each by a sketch's seed."""
    stores, queries = [], []
    every = torch.arange(len(task.rows))
    for seed, sketch_seed in tqdm(seeds, desc="Recording", unit="training"):
        model = task.train(every, seed)[-1].model
        sketch = ModelSketch.from_model(model, out_size, seed=sketch_seed)
        stores.append(task.record(sketch, seed))
        queries.append(sketched(task, model, task.queries, sketch))
    return {name: combine_scores(stores, queries, name) for name in _METHODS}


def groups_of(each: Tensor, count: int) -> Tensor:
    """Return disjoint groups of `count` trainings, (groups, count, ...)."""
    whole = len(each) // count
    return each[: whole * count].unflatten(0, (whole, count))


def gains(each: Tensor, subsets: Tensor, losses: Tensor) -> dict[int, dict[str, Any]]:
    """Datamodeling scores of means over disjoint groups of `count` trainings.

    Shapes:
        each (trainings, queries, rows)

    Returns:
        by number of trainings: each group's mean over the queries, their mean, and its
        standard error over the queries.
    """
    results: dict[int, dict[str, Any]] = {}
    for count in _COUNTS:
        means = groups_of(each, count).mean(1)
        lds = torch.stack(
            [linear_datamodeling_score(scores, subsets, losses) for scores in means]
        )
        results[count] = {
            "groups": lds.nanmean(1).tolist(),
            "lds": float(lds.nanmean()),
            "standard_error": float(lds.nanmean(0).std()) / lds.shape[1] ** 0.5,
        }
    return results


def coverage(estimates: Tensor, changes: Tensor) -> dict[int, dict[str, float]]:
    """How often 90% intervals by the spread hold what retraining did.

    Shapes:
        estimates (trainings, removals, queries), changes (removals, seeds, queries)

    Returns:
        by number of trainings behind an interval, over disjoint groups: the shares of
        intervals that hold the truth, the truth when its own noise widens them, and the
        mean of all other trainings; the slope of the truth over the estimates, and
        medians.
    """
    truths = changes.mean(1)
    noise = changes.std(1) / changes.shape[1] ** 0.5
    results: dict[int, dict[str, float]] = {}
    for count, width in _STUDENT.items():
        several = groups_of(estimates, count)
        means, half = several.mean(1), width * several.std(1) / count**0.5
        others = (estimates.sum(0) - several.sum(1)) / max(1, len(estimates) - count)
        errors = (means - truths).abs()
        wider = (half.square() + (_NORMAL * noise).square()).sqrt()
        results[count] = {
            "truth": float((errors <= half).double().mean()),
            "truth_with_its_noise": float((errors <= wider).double().mean()),
            "other_trainings": float(((means - others).abs() <= half).double().mean()),
            "slope": float((means * truths).sum() / means.square().sum()),
            "median_half_width": float(half.median()),
            "median_error": float(errors.median()),
            "median_noise": float(noise.median()),
        }
    return results


def measure(arguments: SeveralTrainingsArguments) -> dict[str, Any]:
    """Record, combine, retrain and compare."""
    common = {**arguments.shared, "seeds": arguments.seeds}
    lds = LdsArguments(**common, subsets=arguments.subsets)
    task = task_of(lds)
    subsets, losses = ground_truth(task, lds)
    seeds = range(_FIRST_SEED, _FIRST_SEED + arguments.trainings)
    trainings = recorded_scores(task, arguments.out_size, [(s, s) for s in seeds])
    sketches = recorded_scores(
        task, arguments.out_size, [(_FIRST_SEED, seed) for seed in seeds]
    )
    default = trainings["preconditioned"].each
    labels = torch.tensor([int(row["labels"]) for row in task.rows])
    sets = removed_sets(default.mean(0), labels, arguments.removals)
    removals = RemovalsArguments(**common, removals=arguments.removals)
    changes = retrained(task, removals, sets)[:, :, :-1]
    per_score = 1 / (len(task.rows) * task.epochs)
    sums = [per_score * default[:, :, some].sum(2) for some in sets]
    return {
        "trainings": {n: gains(x.each, subsets, losses) for n, x in trainings.items()},
        "sketches_of_one_training": {
            n: gains(x.each, subsets, losses) for n, x in sketches.items()
        },
        "coverage": coverage(torch.stack(sums, 1), changes),
    }


def run_several_trainings(arguments: SeveralTrainingsArguments) -> dict[str, Any]:
    """Measure, print and save.

    Raises:
        ValueError: the task is unknown.
    """
    arguments = of_task(arguments, _TINY, SETTINGS)
    results = measure(arguments)
    _print(results)
    name = f"several_trainings_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _print(results: dict[str, Any]) -> None:
    for what in ("trainings", "sketches_of_one_training"):
        for method, found in results[what].items():
            parts = [f"{count}: {x['lds']:.3f}" for count, x in found.items()]
            print(f"LDS by number of {what}, {method}: {', '.join(parts)}")
    for count, found in results["coverage"].items():
        parts = [f"{name} {value:.3g}" for name, value in found.items()]
        print(f"intervals of {count} trainings: {', '.join(parts)}")


if __name__ == "__main__":
    parser = HfArgumentParser(SeveralTrainingsArguments)
    run_several_trainings(*parser.parse_args_into_dataclasses())
