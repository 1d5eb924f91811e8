"""What a run of the intrinsic dimension leaves: numbers, a plot and a model card."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import Seq2SeqTrainingArguments

from hf_sketch import DimensionSearch
from hf_sketch.recipes.dimension.interval import DimensionInterval
from hf_sketch.recipes.dimension.runs import DimensionRun, Task
from hf_sketch.recipes.options.dimension import DimensionArguments
from hf_sketch.recipes.saved_report import save_card, save_report
from hf_sketch.recipes.spectrum_report import plots_if_installed

_CARD = """
# {name} in a subspace of {dim:,} dimensions

A subspace adapter of hf-sketch: all parameters of {model} move, in {dim:,} dimensions
of a fixed {operator} map (seed {seed}). {finding}

{table}

{interval}Trained with Adam, a constant learning rate of {rate:g} and {batch} examples
in a batch. All settings are in `results.json`.

Parameters that {model} lacks, as a classifier's head, were drawn after
`transformers.set_seed({seed})`. Do the same before you make the base model that
`PeftModel.from_pretrained` gets; it refuses another one.
"""


def save_run(
    name: str,
    task: Task,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    run: DimensionRun,
) -> None:
    """Print what was found; write results.json, the plot and README.md.

    Args:
        name: name of the recipe.
        task: what was learned.
        arguments: as they were used.
        training: as it was used.
        run: what was found.
    """
    directory = Path(training.output_dir)
    print(table_of(run.search))
    print(finding_of(run.search, run.baseline))
    if run.interval is not None:
        print(interval_of(run.interval))
    settings = argparse.Namespace(
        **vars(arguments),
        recipe=name,
        name=task.setup.name,
        training=training.to_dict(),
    )
    path = save_report(str(directory), "results", settings, results_of(run))
    print("saved", path)
    print("saved", _save_card(task.setup.name, arguments, training, run))
    plots = plots_if_installed()
    if plots is not None:
        picture = directory / "intrinsic_dimension.svg"
        plots.plot_dimension_search(run.search).savefig(picture)
        print("saved", picture)


def results_of(run: DimensionRun) -> dict[str, Any]:
    """What a report keeps of a run."""
    return {
        "metric": run.search.metric,
        "target": run.search.target,
        "baseline": run.baseline,
        "dimension": run.search.dimension,
        "path": [dataclasses.asdict(stage) for stage in run.search.path],
        "interval": run.interval and dataclasses.asdict(run.interval),
        "seconds": run.seconds,
    }


def table_of(search: DimensionSearch) -> str:
    """A line for each evaluation, as Markdown."""
    lines = [
        f"| step | dimension | {search.metric} | then |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {stage.step} | {stage.dim} | {stage.metric:.4f} | {stage.decision} |"
        for stage in search.path
    ]
    return "\n".join(lines)


def finding_of(search: DimensionSearch, baseline: float | None) -> str:
    """What the search says, in a sentence or two."""
    full = "" if baseline is None else f" Full fine-tuning reached {baseline:.4f}."
    goal = f"{search.metric} of {search.target:.4f}"
    if search.dimension is None:
        largest = max(stage.dim for stage in search.path)
        return f"Up to {largest:,} dimensions did not reach {goal}.{full}"
    return f"{search.dimension:,} dimensions reached {goal}.{full}"


def interval_of(interval: DimensionInterval) -> str:
    """What bisections say, in a sentence or two."""
    tried = "; ".join(
        f"{trial.dim:,}: " + ", ".join(f"{best:.4f}" for best in trial.best)
        for trial in interval.trials
    )
    above = f"above {interval.low:,} and " if interval.low else ""
    trained = any(trial.dim == interval.high for trial in interval.trials)
    reach = "most trainings reach" if trained else "the search reached"
    found = f"{above}at most {interval.high:,}: {reach} the target in {interval.high:,}"
    if interval.low:
        found += f", and most trainings do not in {interval.low:,}."
    else:
        found += ". Nothing smaller was tried: pass more --bisections."
    return f"The least dimension is {found} Tried: {tried}."


def _save_card(
    name: str,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    run: DimensionRun,
) -> Path:
    """Write README.md of the adapter; a base model that is no folder is on the Hub."""
    model = arguments.model_name_or_path
    base = None if model is None or Path(model).exists() else model
    interval = "" if run.interval is None else f"{interval_of(run.interval)}\n\n"
    text = _CARD.format(
        name=name,
        dim=run.search.path[-1].dim,
        model=base or name.partition(" on ")[0],
        operator=arguments.operator,
        seed=training.seed,
        finding=finding_of(run.search, run.baseline),
        table=table_of(run.search),
        interval=interval,
        rate=training.learning_rate,
        batch=training.per_device_train_batch_size,
    )
    tags = ["intrinsic-dimension"]
    data = ModelCardData(library_name="peft", tags=tags, base_model=base)
    return save_card(Path(training.output_dir), data, text)
