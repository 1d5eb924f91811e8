"""How well `find_mislabeled` and `find_duplicates` find what was planted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import CounterRandom, GradientRows, load_sketches
from hf_sketch.attribution.evaluation import mislabel_auc
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.paper.saved_losses import SavedLosses
from hf_sketch.recipes.tables.quality.audit_tasks import (
    LabelTask,
    accuracy_after,
    digits_task,
    snli_head_task,
    snli_task,
    sources_task,
)
from hf_sketch.recipes.tables.quality.planted_labels import Planted, planted_in
from hf_sketch.recipes.training_defaults import with_small

_TINY = {"rows": 60, "test_rows": 20, "epochs": 2, "seeds": 2, "copies": 3}
_EPOCHS = {"digits": 30, "snli": 3, "snli_head": 10, "sources": 3}
_WORST = (0.02, 0.1)
# Of Student's distribution, by the number of seeds: 95% lie within.
_STUDENT = dict(
    zip(
        range(2, 11),
        (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26),
        strict=True,
    )
)


@dataclass
class AuditStudyArguments(ReportArguments):
    """Wrong labels and copies planted, looked for, and left out of a new training.

    Scores are those of `find_mislabeled`, its parts, and the loss of the last epoch.
    Trainings are kept in output_dir: an interrupted study resumes.
    """

    task: str = field(
        default="digits",
        metadata={
            "help": "digits (a perceptron), snli (MiniLM), snli_head (a head on the "
            "frozen MiniLM) or sources (MiniLM; which of two files eight words are "
            "from)."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Rows of SNLI, for snli and snli_head."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "SNLI rows to test on."}
    )
    source_files: str | None = field(
        default=None,
        metadata={"help": "Two files with texts, comma-separated, for sources."},
    )
    rows: int = field(default=1000, metadata={"help": "Training rows."})
    test_rows: int = field(default=700, metadata={"help": "Rows accuracy is taken on."})
    epochs: int | None = field(
        default=None, metadata={"help": "Epochs; by default 30 for digits, else 3."}
    )
    seeds: int = field(
        default=3,
        metadata={"help": "Repetitions, 2 to 10: other wrong labels, order and model."},
    )
    fraction: float = field(
        default=0.1,
        metadata={"help": "Share of labels made wrong, and of rows dropped."},
    )
    copies: int = field(
        default=20,
        metadata={"help": "Number of planted exact copies, and of near copies."},
    )
    drops: str = field(
        default="suspicion,excess_loss,random,wrong",
        metadata={"help": "Scores by which rows are dropped before each training."},
    )
    tiny: bool = field(default=False, metadata={"help": "A few rows, as a check."})


def run_audit_study(arguments: AuditStudyArguments) -> dict[str, Any]:
    """Plant, train, look, train again, print and save.

    Raises:
        ValueError: the task is unknown, or a file that it needs is not given.
    """
    if arguments.tiny:
        arguments = with_small(arguments, _TINY)
    if arguments.seeds not in _STUDENT:
        raise ValueError(
            f"seeds must be from 2 to 10, got {arguments.seeds}: pass --seeds 3."
        )
    task = task_of(arguments)
    runs = [one_seed(task, seed, arguments) for seed in range(arguments.seeds)]
    results = {"over_seeds": over_seeds(runs), "seeds": runs}
    _print(results["over_seeds"])
    name = f"audit_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def task_of(arguments: AuditStudyArguments) -> LabelTask:
    """The data and the model."""
    name = arguments.task
    needed = {
        "digits": [],
        "snli": [arguments.train_file, arguments.test_file],
        "snli_head": [arguments.train_file, arguments.test_file],
        "sources": (arguments.source_files or "").split(","),
    }
    if name not in needed:
        raise ValueError(
            f"task must be one of {', '.join(needed)}, got {name!r}: pass --task "
            "digits."
        )
    files = [file for file in needed[name] if file]
    if name != "digits" and len(files) != 2:
        raise ValueError(
            f"The task {name} needs two files, got {files}: pass --train_file and "
            "--test_file for snli, --source_files A,B for sources."
        )
    sizes = (arguments.rows, arguments.test_rows, arguments.epochs or _EPOCHS[name])
    if name == "digits":
        return digits_task(*sizes)
    if name == "sources":
        return sources_task(*sizes, files)
    return (snli_task if name == "snli" else snli_head_task)(*sizes, *files)


def one_seed(
    task: LabelTask, seed: int, arguments: AuditStudyArguments
) -> dict[str, Any]:
    """Return what was found, and accuracies, with one seed of everything."""
    planted = planted_in(task, arguments.fraction, arguments.copies, seed)
    directory = Path(arguments.output_dir) / f"audit_{arguments.task}_{seed}"

    def accuracy(kept: Tensor, seed: int) -> Tensor:
        callbacks, folder = [], directory / "retrained"
        if len(kept) == len(planted.rows):
            callbacks, folder = [GradientSketchCallback(task.out_size)], directory
        some = [planted.rows[number] for number in kept.tolist()]
        found = accuracy_after(task, some, folder, seed, callbacks)
        return torch.tensor([found], dtype=torch.float64)

    settings = {
        name: getattr(arguments, name)
        for name in ("rows", "test_rows", "epochs", "fraction", "copies")
    }
    accuracies = SavedLosses(directory / "accuracies.json", settings, accuracy)
    found = {"all": float(accuracies(torch.arange(len(planted.rows)), seed))}
    store = load_sketches(directory)
    scores = scores_of(store)
    drops = dropped_by(scores, planted.wrong, arguments.fraction, seed)
    for name in arguments.drops.split(","):
        kept = torch.ones(len(planted.rows), dtype=torch.bool)
        kept[drops[name]] = False
        found[name] = float(accuracies(kept.nonzero().squeeze(1), seed))
    return {
        "wrong_labels": {n: figures_of(s, planted.wrong) for n, s in scores.items()},
        "duplicates": duplicates_of(store, planted),
        "accuracy": found,
    }


def scores_of(store: GradientRows) -> dict[str, Tensor]:
    """Scores by name, (examples,), greater for likelier wrong labels."""
    lines = store.find_mislabeled().with_format("torch")[:]
    order = lines["example_id"].argsort()
    scores = {
        name: lines[name][order]
        for name in ("suspicion", "excess_loss", "disagreement", "gradient_norm")
    }
    return {**scores, "last_loss": lines["losses"][order, -1]}


def dropped_by(
    scores: Mapping[str, Tensor], wrong: Tensor, fraction: float, seed: int
) -> dict[str, Tensor]:
    """Rows to drop by name: the worst by each score, random ones, and the wrong."""
    count = round(fraction * len(wrong))
    order = CounterRandom(seed, "dropped").permutation(len(wrong))
    worst = {name: score.argsort(descending=True) for name, score in scores.items()}
    drops = {name: found[:count] for name, found in worst.items()}
    return {**drops, "random": order[:count], "wrong": wrong.nonzero().squeeze(1)}


def figures_of(score: Tensor, wrong: Tensor) -> dict[str, float]:
    """The AUC, and the share of wrong labels among the worst rows."""
    hits = wrong[score.argsort(descending=True, stable=True)].double()
    precisions = {
        f"worst_{part:.0%}": float(hits[: max(1, round(part * len(hits)))].mean())
        for part in _WORST
    }
    return {"auc": mislabel_auc(score, wrong), **precisions}


def duplicates_of(store: GradientRows, planted: Planted) -> dict[str, float]:
    """Precision, recall and F1 of the planted pairs.

    Other pairs of equal rows, which the data had before, count as neither right nor
    wrong; what part of them is found is a figure of its own.
    """
    inputs = [repr(sorted(row.items())) for row in planted.rows]
    equal = {
        (i, j)
        for j, later in enumerate(inputs)
        for i, earlier in enumerate(inputs[:j])
        if earlier == later
    }
    exact, near = set(planted.exact), set(planted.near)
    others = equal - exact
    lines = store.find_duplicates()
    found = set(zip(lines["example_id"][:], lines["other_id"][:], strict=True))
    counted = found - others
    right = len(counted & (exact | near))
    return {
        "pairs": len(counted),
        "precision": right / max(1, len(counted)),
        "recall": right / len(exact | near),
        "f1": 2 * right / (len(counted) + len(exact | near)),
        "exact_found": len(found & exact) / len(exact),
        "near_found": len(found & near) / len(near),
        "other_equal": len(others),
        "other_equal_found": len(found & others),
    }


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of all figures, and 95% intervals of accuracies' gains over all rows."""
    first = runs[0]
    gains = {
        name: [run["accuracy"][name] - run["accuracy"]["all"] for run in runs]
        for name in first["accuracy"]
        if name != "all"
    }
    factor = _STUDENT[len(runs)] / len(runs) ** 0.5
    return {
        "wrong_labels": {
            name: _means(run["wrong_labels"][name] for run in runs)
            for name in first["wrong_labels"]
        },
        "duplicates": _means(run["duplicates"] for run in runs),
        "accuracy": _means(run["accuracy"] for run in runs),
        "gains": {
            name: {"mean": mean(some), "within": factor * stdev(some)}
            for name, some in gains.items()
        },
    }


def _means(figures: Any) -> dict[str, float]:
    """The mean of each of several mappings' figures."""
    every = list(figures)
    return {name: mean(some[name] for some in every) for name in every[0]}


def _print(found: Mapping[str, Any]) -> None:
    print("Wrong labels: AUC, and their share among the worst 2% and 10%")
    for name, figures in found["wrong_labels"].items():
        print(f"  {name:16s}", "  ".join(f"{x:.3f}" for x in figures.values()))
    print("Copies:", ", ".join(f"{n} {x:.2f}" for n, x in found["duplicates"].items()))
    print(f"Accuracy with all rows: {found['accuracy']['all']:.4f}; without")
    for name, gain in found["gains"].items():
        print(f"  {name:16s} {gain['mean']:+.4f} (within {gain['within']:.4f})")


if __name__ == "__main__":
    run_audit_study(
        *HfArgumentParser(AuditStudyArguments).parse_args_into_dataclasses()
    )
