"""How accurate a method of fine-tuning is per trained parameter."""

import copy
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    set_seed,
)

from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.spectrum_report import plots_if_installed
from hf_sketch.recipes.tables.adapters.methods import (
    METHODS,
    SUBSPACES,
    adapted,
    first_rate,
    trained,
)
from hf_sketch.recipes.tables.adapters.snli_layers import snli_task
from hf_sketch.recipes.tables.adapters.task import PeersTask, measured
from hf_sketch.recipes.tables.adapters.xsum_layers import xsum_task
from hf_sketch.recipes.training_defaults import with_small
from hf_sketch.sketches.choices import check_choice

_SNLI: Final = "snli"
_TASKS: Final = {_SNLI: snli_task, "xsum": xsum_task}
_FULL: Final = "full"
_FULL_RATE: Final = 1e-4
_FACTOR: Final = 3.0  # from one learning rate to the next
_MOST_RATES: Final = 7
_FREE: Final = ("methods", "bits", "output_dir", "tiny")  # settings of a run alone
_TINY = {"methods": "full,affd,lora,bitfit", "bits": "12", "seeds": 1, "steps": 2}
_TINY |= {"tuning_rows": 20, "test_rows": 20, "trained_layers": 1, "batch_size": 4}


@dataclass
class SubspacePeersArguments(ReportArguments):
    """Accuracy over trained parameters: subspaces, and methods that PEFT has.

    "snli" is MiniLM on SNLI. The last layers are adapted; what comes before them is the
    same for all methods and computed once. "xsum" is an encoder-decoder of MiniLM's
    first layers on XSum, and its accuracy that of the next token. A method's learning
    rate is tuned for each number of parameters by the loss on rows that are not those
    of the test, with the first seed. Results in <output_dir> are added to, and what is
    there is not measured again.
    """

    task: str = field(default="snli", metadata={"help": "What is learned: snli, xsum."})

    methods: str = field(
        default=",".join((_FULL, *METHODS)), metadata={"help": "Comma-separated."}
    )
    bits: str = field(
        default="8,10,12,14,16,18",
        metadata={"help": "log2 of the numbers of parameters, comma-separated."},
    )
    seeds: int = field(
        default=3, metadata={"help": "Runs at the tuned rate: data order and adapter."}
    )
    trained_layers: int = field(default=2, metadata={"help": "Layers, of six."})
    steps: int = field(default=200, metadata={"help": "Optimizer steps per run."})
    batch_size: int = field(default=16, metadata={"help": "Pairs in a batch."})
    tuning_rows: int = field(default=500, metadata={"help": "Rows of tuning."})
    test_rows: int = field(default=2000, metadata={"help": "Rows of the test."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows of SNLI or XSum instead of our own."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, for tuning and the test."}
    )
    tiny: bool = field(default=False, metadata={"help": "A few runs, as a check."})


def tuned(loss_at: Callable[[float], float], start: float) -> float:
    """Return the rate of the least loss, from `start` by factors until it is inside.

    A loss that is not finite counts as the greatest.
    """

    def found(power: int) -> float:
        loss = losses.get(power)
        if loss is None:
            loss = loss_at(start * _FACTOR**power)
            losses[power] = loss if math.isfinite(loss) else math.inf
        return losses[power]

    losses: dict[int, float] = {}
    for power in (-1, 0, 1):
        found(power)
    while len(losses) < _MOST_RATES:
        best = min(losses, key=found)
        if min(losses) < best < max(losses):
            break
        found(best - 1 if best == min(losses) else best + 1)
    return start * _FACTOR ** min(losses, key=found)


def cell(
    task: PeersTask, arguments: SubspacePeersArguments, method: str, budget: int
) -> dict[str, Any] | None:
    """Tune a method at one number of parameters, and run it with all seeds.

    Returns:
        trained parameters, rate, and by seed the accuracy and the losses; None if the
        method has no such number.
    """

    def model_of(seed: int) -> nn.Module | None:
        if method == _FULL:
            return copy.deepcopy(task.model)
        set_seed(seed)
        return adapted(method, budget, seed, lambda: copy.deepcopy(task.model))

    model = model_of(0)
    if model is None:
        return None

    @cache
    def fitted(rate: float, seed: int) -> nn.Module:
        adapter = model_of(seed)
        assert adapter is not None
        task.fit(adapter, rate, seed, arguments.steps, arguments.batch_size)
        return adapter

    start = _FULL_RATE if method == _FULL else first_rate(method)
    rate = tuned(lambda rate: measured(fitted(rate, 0), task.tuning)[0], start)
    runs: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        tuning_loss, _ = measured(fitted(rate, seed), task.tuning)
        loss, accuracy = measured(fitted(rate, seed), task.test)
        runs.append(
            {"tuning_loss": tuning_loss, "test_loss": loss, "accuracy": accuracy}
        )
    return {"parameters": trained(model), "rate": rate, "runs": runs}


def run_subspace_peers(arguments: SubspacePeersArguments) -> dict[str, Any]:
    """Measure what is not there yet, print and save; plot if matplotlib is there.

    Raises:
        ValueError: the results that are there were measured with other settings.
    """
    if arguments.tiny:
        arguments = with_small(arguments, _TINY)
    check_choice("task", arguments.task, tuple(_TASKS))
    kind = "" if arguments.task == _SNLI else f"{arguments.task}_"
    name = f"subspace_peers_{kind}{arguments.trained_layers}"
    path = Path(arguments.output_dir) / f"{name}.json"
    kept_results(path, arguments)
    count = arguments.steps * arguments.batch_size
    task = _TASKS[arguments.task](
        arguments.trained_layers,
        (count, arguments.tuning_rows, arguments.test_rows),
        arguments.train_file,
        arguments.validation_file,
    )
    cells = [
        (method, int(bits))
        for bits in arguments.bits.split(",")
        for method in arguments.methods.split(",")
    ]
    for method, bits in tqdm(cells, desc="Methods"):
        key = _FULL if method == _FULL else f"{method} {bits}"
        if key not in kept_results(path, arguments):
            found = cell(task, arguments, method, 2**bits)
            # Read again, since others may have added to it.
            results = kept_results(path, arguments) | {key: found}
            save_report(arguments.output_dir, name, arguments, results)
        _print(key, kept_results(path, arguments)[key])
    results = kept_results(path, arguments)
    print("saved", path)
    if plots_if_installed() is not None:
        save_plot(path.with_suffix(".svg"), arguments.task, results)
        print("saved", path.with_suffix(".svg"))
    return results


def kept_results(path: Path, arguments: SubspacePeersArguments) -> dict[str, Any]:
    """Return the results in a report; raise if it was made with other settings."""
    if not path.is_file():
        return {}
    report = json.loads(path.read_text())
    for setting, value in vars(arguments).items():
        # Older reports do not name the task.
        kept = report["arguments"].get(setting, _SNLI if setting == "task" else None)
        if setting not in _FREE and value != kept:
            raise ValueError(
                f"{path} was made with {setting}={kept!r}, not {value!r}. Pass "
                "another --output_dir, or the same setting."
            )
    return report["results"]


def save_plot(
    path: Path, task: str, results: Mapping[str, Mapping[str, Any] | None]
) -> None:
    """Plot each method's accuracy over its numbers of parameters: mean and range."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(8, 5), layout="constrained"
    )
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for key, found in results.items():
        if found is not None:
            accuracies = [run["accuracy"] for run in found["runs"]]
            of = curves.setdefault(key.split()[0], [])
            of.append((found["parameters"], accuracies))
    for _, accuracies in curves.pop(_FULL, []):
        mean = sum(accuracies) / len(accuracies)
        axes.axhline(mean, linestyle="--", color="grey", label="full fine-tuning")
    for place, (method, points) in enumerate(curves.items()):
        sizes, by_size = zip(*sorted(points), strict=True)
        means = [sum(x) / len(x) for x in by_size]
        below = [mean - min(x) for mean, x in zip(means, by_size, strict=True)]
        above = [max(x) - mean for mean, x in zip(means, by_size, strict=True)]
        style = "-o" if method.split("+")[0] in SUBSPACES else ":s"
        axes.errorbar(
            sizes,
            means,
            (below, above),
            fmt=style,
            color=f"C{place % 10}",
            label=method,
            capsize=2,
            alpha=0.8,
        )
    axes.set_xscale("log", base=2)
    of = f"accuracy on {task.upper()}: mean, range"
    axes.set(xlabel="trained parameters", ylabel=of)
    axes.legend(ncols=2)
    figure.savefig(path)


def _print(key: str, found: dict[str, Any] | None) -> None:
    if found is None:
        print(f"{key}: no adapter of about that many parameters")
        return
    accuracies = torch.tensor([run["accuracy"] for run in found["runs"]])
    span = f"{accuracies.min():.3f} to {accuracies.max():.3f}"
    print(
        f"{key}: {found['parameters']:,} parameters, rate {found['rate']:.1e}, "
        f"accuracy {accuracies.mean():.3f} ({span})",
        flush=True,
    )


if __name__ == "__main__":
    parser = HfArgumentParser(SubspacePeersArguments)
    run_subspace_peers(*parser.parse_args_into_dataclasses())
