"""What the recipes of the intrinsic dimension are told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_sketch.recipes.small_settings import with_small

Arguments = TypeVar("Arguments", bound="DimensionArguments")

# These operators take no out_size above a parameter's size, one parameter at a time.
_FLAT_ONLY = ("qk", "ffd", "dense")

# 90% of full fine-tuning (Schioppa 2024, A.6), in the units of the metric scripts.
PAPER_TARGETS = {"eval_accuracy": 0.801, "eval_rouge1": 36.6, "eval_rouge2": 15.69}


@dataclass
class DimensionArguments:
    """A search for the least dimension in which fine-tuning reaches a target."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "By default the paper's, from the Hub."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": ".json, .jsonl, .csv or one of these with .gz, of premise, "
            "hypothesis, label or of document, summary; by default the Hub's rows."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "In the same form, for evaluation."}
    )
    small: bool = field(
        default=False,
        metadata={
            "help": "Minutes on two cores, without network: a small model, few rows "
            "and smaller numbers wherever you leave the default."
        },
    )
    operator: str = field(default="affd", metadata={"help": "The sketch's operator."})
    layout: str | None = field(
        default=None,
        metadata={
            "help": "blocked, factored or flat; by default flat for qk, ffd and dense, "
            "which must not have more numbers than a block, and else blocked."
        },
    )
    start_dim: int = field(
        default=2**10, metadata={"help": "The dimension that the search begins with."}
    )
    max_dim: int = field(
        default=2**14, metadata={"help": "Of the fixed subspace that it grows in."}
    )
    stage_steps: int = field(
        default=2000, metadata={"help": "Optimizer steps between evaluations."}
    )
    metric: str = field(
        default="eval_accuracy", metadata={"help": "Of evaluation, to be maximised."}
    )
    min_improvement: float = field(
        default=0.001,
        metadata={"help": "A stage that improves the metric by less doubles."},
    )
    target: float | None = field(
        default=None,
        metadata={"help": "By default the paper's; after --baseline 90% of that."},
    )
    baseline: bool = field(
        default=False,
        metadata={"help": "Full fine-tuning first, in output_dir/baseline."},
    )
    baseline_steps: int = field(
        default=10_000, metadata={"help": "Of full fine-tuning."}
    )
    baseline_learning_rate: float = field(
        default=2e-5, metadata={"help": "Of full fine-tuning."}
    )
    check_half: bool = field(
        default=False,
        metadata={
            "help": "Train with half of the dimension found for all max_steps, in "
            "output_dir/half: the metric should stay below the target."
        },
    )
    num_hidden_layers: int | None = field(
        default=None,
        metadata={
            "help": "The model's first layers, of an encoder and a decoder each."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Rows trained on; by default all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Rows evaluated on; by default all."}
    )

    @property
    def sketch_layout(self) -> str:
        """As given, or the one that the operator takes."""
        return self.layout or ("flat" if self.operator in _FLAT_ONLY else "blocked")

    @property
    def given_target(self) -> float | None:
        """The metric to reach; None for 90% of the baseline."""
        if self.target is not None or self.baseline:
            return self.target
        if self.metric not in PAPER_TARGETS:
            raise ValueError(
                f"metric must be one of {list(PAPER_TARGETS)}, for which the paper has "
                f"a target, got {self.metric!r}: pass --target or --baseline as well."
            )
        return PAPER_TARGETS[self.metric]


@dataclass
class DimensionTrainingArguments(Seq2SeqTrainingArguments):
    """The Trainer's settings, by default the paper's: Adam with a constant rate."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Of the search."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "How the learning rate changes."}
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Examples in a batch."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Examples in a batch of evaluation."}
    )
    max_steps: int = field(default=10_000, metadata={"help": "Of the search."})
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints that are kept."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint of the search, or true for its last. Full "
            "fine-tuning that has ended is not repeated."
        },
    )


def with_small_search(arguments: Arguments, small: dict[str, Any]) -> Arguments:
    """Small settings where the default is left, with a baseline to give a target."""
    baseline = arguments.target is None
    return with_small(arguments, {**small, "baseline": baseline})


def checkpoint_in(training: DimensionTrainingArguments) -> str | None:
    """What a run in output_dir goes on from: as given, or the last; None for none."""
    given = training.resume_from_checkpoint
    if given is None or given.lower() != "true":
        return given
    directory = training.output_dir
    return get_last_checkpoint(directory) if Path(directory).is_dir() else None
