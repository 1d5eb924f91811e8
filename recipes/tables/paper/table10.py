"""Table 10: the intrinsic dimension on SNLI or XSum, by operator and seed."""

import argparse
import dataclasses
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, Seq2SeqTrainingArguments, set_seed

from hf_sketch.recipes.dimension.report import save_run
from hf_sketch.recipes.dimension.runs import (
    DimensionRun,
    Task,
    full_fine_tuning,
    timed_search,
)
from hf_sketch.recipes.options.dimension import (
    DimensionArguments,
    SnliArguments,
    XsumArguments,
)
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.snli import SnliTrainingArguments, snli_task
from hf_sketch.recipes.spectrum_report import plots_if_installed
from hf_sketch.recipes.training_defaults import with_small
from hf_sketch.recipes.xsum import XsumTrainingArguments, xsum_task

# log2 of D* for three seeds (Schioppa 2024, Table 10): accuracy and ROUGE-1.
PAPER = {
    "snli": {"ffd": (14, 13, 13), "afjl": (14, 13, 13), "qk": (13, 13, 13)},
    "xsum": {"ffd": (26, 25, 25), "afjl": (24, 24, 25), "qk": (26, 25, 26)},
}


@dataclass
class Table10Arguments(ReportArguments):
    """D* for operators and seeds, by default of MiniLM on SNLI.

    A run that has ended is kept in <output_dir>/table10, or table10_xsum, and not
    repeated; one that was interrupted goes on from its last checkpoint.
    """

    operators: str = field(
        default="affd,afjl,qk,ffd", metadata={"help": "Operators, comma-separated."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs of each operator."})
    task: Literal["snli", "xsum"] = field(
        default="snli", metadata={"help": "Task that the model is trained on."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model; the embedded MiniLM by default, a tiny BART on XSum."
        },
    )
    encoder_decoder: bool = field(
        default=False,
        metadata={
            "help": "Build an encoder and a decoder from the given model, for XSum."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Data file; the package's own rows by default."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Data file; the package's own rows by default."}
    )
    num_hidden_layers: int = field(
        default=6, metadata={"help": "The first ones; with two, MiniLM learns slowly."}
    )
    max_length: int = field(default=48, metadata={"help": "Tokens of a pair."})
    max_source_length: int = field(
        default=64, metadata={"help": "Tokens of a document."}
    )
    max_target_length: int = field(
        default=24, metadata={"help": "Tokens of a summary."}
    )
    max_eval_samples: int = field(
        default=500, metadata={"help": "Rows of an evaluation."}
    )
    start_dim: int = field(default=2**10, metadata={"help": "First dimension."})
    max_dim: int = field(default=2**15, metadata={"help": "Largest dimension."})
    stage_steps: int = field(
        default=25, metadata={"help": "Optimizer steps between evaluations."}
    )
    max_steps: int = field(default=400, metadata={"help": "Steps per search."})
    learning_rate: float = field(
        default=1.4e-3,
        metadata={"help": "Learning rate at max_dim; it scales with sqrt(dim)."},
    )
    min_improvement: float = field(
        default=0.01,
        metadata={"help": "A stage that improves by less doubles; 0.5 on XSum."},
    )
    baseline_steps: int = field(
        default=160, metadata={"help": "Steps of full fine-tuning."}
    )
    baseline_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of full fine-tuning."}
    )
    batch_size: int = field(default=16, metadata={"help": "Examples in a batch."})
    tiny: bool = field(
        default=False, metadata={"help": "A few steps and rows, as a check."}
    )


_XSUM = {"min_improvement": 0.5}
_TINY = {"stage_steps": 2, "max_steps": 4, "baseline_steps": 2, "max_eval_samples": 12}
_TINY |= {"num_hidden_layers": 1, "start_dim": 2**4, "max_dim": 2**6}
_TINY |= {"batch_size": 4, "max_length": 16}


def run_table10(arguments: Table10Arguments) -> dict[str, Any]:
    """Search, print beside the paper's figures, save, and plot with matplotlib.

    Raises:
        ValueError: the runs that are kept had other settings.
    """
    if arguments.task == "xsum":
        arguments = with_small(arguments, _XSUM)
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, **_TINY)
    name = "table10" if arguments.task == "snli" else "table10_xsum"
    directory = Path(arguments.output_dir) / name
    _check_settings(arguments, directory)
    results: dict[str, Any] = {key: [] for key in arguments.operators.split(",")}
    baseline: float | None = None
    for seed in range(arguments.seeds):
        task = _task(arguments, seed)
        if baseline is None:
            training = _training(arguments, directory, seed)
            settings = _settings(arguments, "affd")
            baseline = full_fine_tuning(task, settings, training)
        for operator, runs in results.items():
            folder = directory / f"{operator}-{seed}"
            runs.append(_run(arguments, task, operator, seed, folder, baseline))
    _print(arguments.task, results)
    path = save_report(
        arguments.output_dir,
        name,
        argparse.Namespace(**vars(arguments), baseline=baseline),
        results,
    )
    print("saved", path)
    if plots_if_installed() is not None:
        save_plot(path.with_suffix(".svg"), results)
        print("saved", path.with_suffix(".svg"))
    return results


def log2_dims(runs: list[dict[str, Any]]) -> list[int | None]:
    """log2 of D* of each run, rounded down; None where it was not found."""
    found = [run["dimension"] for run in runs]
    return [None if dim is None else dim.bit_length() - 1 for dim in found]


def save_plot(path: Path, results: dict[str, Any]) -> None:
    """The metric over the steps of each run, and log2 of D* of each operator."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(9, 4), layout="constrained"
    )
    curves, dims = figure.subplots(1, 2)
    for place, (operator, runs) in enumerate(results.items()):
        for number, run in enumerate(runs):
            curves.plot(
                [stage["step"] for stage in run["path"]],
                [stage["metric"] for stage in run["path"]],
                color=f"C{place}",
                label=operator.upper() if number == 0 else None,
            )
        found = [dim for dim in log2_dims(runs) if dim is not None]
        offsets = [place + 0.1 * (i - 1) for i in range(len(found))]
        dims.plot(offsets, found, "o", color=f"C{place}")
    first = next(iter(results.values()))[0]
    curves.axhline(first["target"], linestyle="--", color="grey")
    curves.set(xlabel="optimizer step", ylabel=f"{first['metric']}; dashed, the target")
    curves.legend()
    dims.set_xticks(range(len(results)), [name.upper() for name in results])
    dims.set_ylabel("log2 of D*, a point for each seed")
    figure.savefig(path)


def settings_of(arguments: Table10Arguments) -> dict[str, Any]:
    """Those that all runs of a table share."""
    free = ("output_dir", "operators", "seeds", "tiny")
    return {key: value for key, value in vars(arguments).items() if key not in free}


def _check_settings(arguments: Table10Arguments, directory: Path) -> None:
    """Note the settings of the runs there; raise if they had others."""
    given = settings_of(arguments)
    path = directory / "settings.json"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(given, indent=1))
    kept = json.loads(path.read_text())
    other = [key for key in given if given[key] != kept.get(key)]
    if other:
        raise ValueError(
            f"the runs in {directory} must have { {k: kept.get(k) for k in other} }, "
            f"got { {k: given[k] for k in other} }: pass another --output_dir, or "
            "delete that folder."
        )


def _task(arguments: Table10Arguments, seed: int) -> Task:
    """The model, whose new layers the seed draws, and the rows."""
    set_seed(seed)
    settings = _settings(arguments, "affd")
    return xsum_task(settings) if arguments.task == "xsum" else snli_task(settings)


def _settings(arguments: Table10Arguments, operator: str) -> DimensionArguments:
    """Of the recipe, which the table's are named like."""
    kind = XsumArguments if arguments.task == "xsum" else SnliArguments
    names = {f.name for f in dataclasses.fields(kind)}
    own = {key: value for key, value in vars(arguments).items() if key in names}
    return kind(**own, operator=operator, small=True, baseline=True)


def _training(
    arguments: Table10Arguments, folder: Path, seed: int
) -> Seq2SeqTrainingArguments:
    """Of the Trainer, for a run that goes on where it was interrupted."""
    given = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": arguments.max_steps,
        "learning_rate": arguments.learning_rate,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": 100,
        "save_steps": arguments.stage_steps,
        "dataloader_pin_memory": False,
        "report_to": [],
        "resume_from_checkpoint": "true",
    }
    if arguments.task == "snli":
        return SnliTrainingArguments(**given)
    return XsumTrainingArguments(
        **given, generation_max_length=arguments.max_target_length
    )


def _run(
    arguments: Table10Arguments,
    task: Task,
    operator: str,
    seed: int,
    folder: Path,
    baseline: float,
) -> dict[str, Any]:
    """What the report of a run keeps: as it was saved, or after a search."""
    saved = folder / "results.json"
    if not saved.is_file():
        settings = _settings(arguments, operator)
        training = _training(arguments, folder, seed)
        search, seconds = timed_search(task, settings, training, baseline)
        run = DimensionRun(search, baseline, None, seconds)
        save_run("table10", task, settings, training, run)
    return json.loads(saved.read_text())["results"]


def _print(task: str, results: dict[str, Any]) -> None:
    """log2 of D* of each operator beside the paper's."""
    print(f"log2 of D* by seed on {task}, and the paper's for RoBERTa or BART")
    for operator, runs in results.items():
        hours = sum(run["seconds"] for run in runs) / 3600
        ours = log2_dims(runs)
        print(
            f"  {operator:5s} {ours} in {hours:.2f} h  "
            f"paper {PAPER[task].get(operator)}"
        )


if __name__ == "__main__":
    run_table10(*HfArgumentParser(Table10Arguments).parse_args_into_dataclasses())
