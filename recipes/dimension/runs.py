"""Full fine-tuning, the search for the dimension, and its interval."""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_sketch import DimensionSearch, SubspaceConfig, load_dimension_search
from hf_sketch.callbacks import IntrinsicDimensionCallback
from hf_sketch.recipes.dimension.interval import DimensionInterval, Trial, bisect
from hf_sketch.recipes.dimension.saved import save_metrics, saved_metric, settings_of
from hf_sketch.recipes.options.dimension import DimensionArguments
from hf_sketch.recipes.setups import Setup
from hf_sketch.sketches.choices import check_count

_BASELINE = "baseline.json"
_BEST = "best.json"


@dataclass(frozen=True)
class Task:
    """What is learned, and how well.

    Args:
        setup: the model and the rows that it is trained on; every run copies the model.
        eval_dataset: tokenized.
        compute_metrics: function that computes metrics from the Trainer's predictions.
        metrics: what that gives, by the names that the Trainer reports.
    """

    setup: Setup
    eval_dataset: Dataset
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class DimensionRun:
    """What a recipe found.

    Args:
        search: its path and the dimension.
        baseline: the metric of full fine-tuning; None without.
        interval: the interval of the dimension; None without bisections, or if the
            search found none.
        seconds: seconds of the search, since it was resumed.
    """

    search: DimensionSearch
    baseline: float | None
    interval: DimensionInterval | None
    seconds: float


def run_dimension(
    task: Task, arguments: DimensionArguments, training: Seq2SeqTrainingArguments
) -> DimensionRun:
    """Full fine-tuning if asked, the search, and bisections if asked.

    Raises:
        ValueError: an argument is bad, or full fine-tuning does not reach the target.
    """
    check_count("bisections", arguments.bisections, least=0)
    check_count("bisection_seeds", arguments.bisection_seeds)
    baseline = None
    if arguments.baseline:
        baseline = full_fine_tuning(task, arguments, training)
    search, seconds = timed_search(task, arguments, training, baseline)
    interval = None
    if arguments.bisections and search.dimension is not None:
        interval = find_interval(task, arguments, training, search)
    return DimensionRun(search, baseline, interval, seconds)


def full_fine_tuning(
    task: Task, arguments: DimensionArguments, training: Seq2SeqTrainingArguments
) -> float:
    """The metric of the whole model, fine-tuned in output_dir/baseline.

    A run that is resumed takes the figure that is there.

    Raises:
        ValueError: that is of other settings, or evaluation does not give the metric,
            which is said before training.
    """
    if arguments.metric not in task.metrics:
        raise ValueError(
            f"metric must be one of those of evaluation, {list(task.metrics)}, got "
            f"{arguments.metric!r}: pass one of them as --metric."
        )
    directory = Path(training.output_dir) / "baseline"
    saved = directory / _BASELINE
    changed = dataclasses.replace(
        training,
        output_dir=str(directory),
        learning_rate=arguments.baseline_learning_rate,
        max_steps=arguments.baseline_steps,
        resume_from_checkpoint=training.resume_from_checkpoint and "true",
    )
    settings = {**settings_of(arguments, changed), "seed": training.seed}
    if training.resume_from_checkpoint and saved.is_file():
        return saved_metric(saved, arguments.metric, settings)
    print(f"full fine-tuning for {changed.max_steps:,} steps")
    trainer = _train(task, copy.deepcopy(task.setup.model), changed)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_metrics(saved, settings, metrics)
    print(f"full fine-tuning: {arguments.metric} {metrics[arguments.metric]:.4g}")
    return float(metrics[arguments.metric])


def timed_search(
    task: Task,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    baseline: float | None = None,
) -> tuple[DimensionSearch, float]:
    """One search in output_dir, which keeps its path and the adapter; its seconds.

    Args:
        task: what is learned.
        arguments: arguments of the search; its target counts from `given_target`.
        training: arguments of the Trainer; their seed draws the subspace.
        baseline: the metric of full fine-tuning.
    """
    callback = IntrinsicDimensionCallback(
        target=arguments.given_target,
        metric=arguments.metric,
        stage_steps=arguments.stage_steps,
        min_improvement=arguments.min_improvement,
        baseline=baseline,
    )
    start = time.perf_counter()
    model = _in_subspace(task, arguments, training, arguments.start_dim)
    _train(task, model, training, callback).save_model()
    seconds = time.perf_counter() - start
    return load_dimension_search(training.output_dir), seconds


def find_interval(
    task: Task,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    search: DimensionSearch,
) -> DimensionInterval:
    """Train in dimensions below the one that a search found, in output_dir/interval.

    A run that is resumed takes the figures of the trainings that have ended.

    Args:
        task: what was learned.
        arguments: arguments of the search.
        training: arguments of the Trainer in the search; seeds count from theirs.
        search: search that found a dimension.

    Raises:
        ValueError: those trainings had other settings.
    """

    def trial_at(dim: int) -> Trial:
        seeds = range(training.seed, training.seed + arguments.bisection_seeds)
        best = tuple(_best(task, arguments, training, search, dim, s) for s in seeds)
        reached = sum(map(search.reaches, best))
        return Trial(dim, best, 2 * reached > len(best))

    assert search.dimension is not None
    return bisect(search.dimension, trial_at, arguments.bisections)


def _best(
    task: Task,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    search: DimensionSearch,
    dim: int,
    seed: int,
) -> float:
    """The best metric of one training in a subspace of `dim` dimensions."""
    directory = Path(training.output_dir) / "interval" / f"{dim}-{seed}"
    saved = directory / _BEST
    settings = {
        **settings_of(arguments, training),
        "stage_steps": arguments.stage_steps,
        "operator": arguments.operator,
        "layout": arguments.sketch_layout,
        "max_dim": arguments.max_dim,
    }
    if training.resume_from_checkpoint and saved.is_file():
        return saved_metric(saved, search.metric, settings)
    changed = dataclasses.replace(
        training,
        seed=seed,
        output_dir=str(directory),
        eval_strategy="steps",
        eval_steps=min(arguments.stage_steps, training.max_steps),
        save_strategy="no",
        resume_from_checkpoint=None,
    )
    print(f"{dim:,} dimensions with seed {seed}, for {changed.max_steps:,} steps")
    trainer = _train(task, _in_subspace(task, arguments, changed, dim), changed)
    history = trainer.state.log_history
    metrics = [line[search.metric] for line in history if search.metric in line]
    best = max(metrics) if search.greater_is_better else min(metrics)
    if trainer.is_world_process_zero():
        save_metrics(saved, settings, {search.metric: best})
    return best


def _in_subspace(
    task: Task,
    arguments: DimensionArguments,
    training: Seq2SeqTrainingArguments,
    dim: int,
) -> Any:
    """A copy of the model that moves in the first dimensions of the search's map."""
    config = SubspaceConfig(
        dim=dim,
        max_dim=arguments.max_dim,
        operator=arguments.operator,
        layout=arguments.sketch_layout,
        seed=training.seed,
    )
    return get_peft_model(copy.deepcopy(task.setup.model), config)


def _train(
    task: Task,
    model: PreTrainedModel,
    training: Seq2SeqTrainingArguments,
    *callbacks: TrainerCallback,
) -> Seq2SeqTrainer:
    """Train a model, from a checkpoint if asked."""
    set_seed(training.seed)
    trainer = Seq2SeqTrainer(
        model,
        training,
        data_collator=task.setup.collator,
        train_dataset=task.setup.train_dataset,
        eval_dataset=task.eval_dataset,
        processing_class=task.setup.tokenizer,
        compute_metrics=task.compute_metrics,
        callbacks=[*callbacks],
    )
    trainer.train(resume_from_checkpoint=_checkpoint_in(training))
    return trainer


def _checkpoint_in(training: Seq2SeqTrainingArguments) -> str | None:
    """The checkpoint to resume from: the given one, or output_dir's last if "true"."""
    given = training.resume_from_checkpoint
    if given is None or given.lower() != "true":
        return given
    directory = training.output_dir
    return get_last_checkpoint(directory) if Path(directory).is_dir() else None
