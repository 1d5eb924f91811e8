"""Metrics of trainings that have ended, which a resumed run does not repeat."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from hf_sketch.durable import replace_file
from hf_sketch.recipes.options.dimension import DimensionArguments

# Arguments that say nothing about a training beside the search,
_OF_THE_SEARCH = {
    "target",
    "start_dim",
    "max_dim",
    "operator",
    "layout",
    "stage_steps",
    "min_improvement",
    "baseline",
    "baseline_steps",
    "baseline_learning_rate",
    "bisections",
    "bisection_seeds",
}
# and the Trainer's arguments that do.
_OF_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
)


def settings_of(
    arguments: DimensionArguments, training: Seq2SeqTrainingArguments
) -> dict[str, Any]:
    """Return what a training depends on, besides its seed and its subspace."""
    given, kept = dataclasses.asdict(arguments), training.to_dict()
    own = {name: x for name, x in given.items() if name not in _OF_THE_SEARCH}
    return own | {name: kept[name] for name in _OF_TRAINING}


def save_metrics(
    path: Path, settings: dict[str, Any], metrics: dict[str, float]
) -> None:
    """Keep the metrics of a training that has ended, with its settings."""
    content = json.dumps({**settings, "metrics": metrics}, indent=1)
    replace_file(path, content.encode())


def saved_metric(path: Path, metric: str, settings: dict[str, Any]) -> float:
    """Return the metric of a training that has ended.

    Raises:
        ValueError: it had other settings.
    """
    content = json.loads(path.read_text())
    found = {n: content.get(n) for n, x in settings.items() if content.get(n) != x}
    if found:
        wanted = {name: settings[name] for name in found}
        raise ValueError(
            f"the training in {path.parent} must have had {wanted}, got {found}: pass "
            "the settings that it had, or delete that folder."
        )
    return float(content["metrics"][metric])
