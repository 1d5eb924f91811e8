"""Section 5.4 of the paper: the intrinsic dimension of a classifier on SNLI."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_sketch import DimensionSearch
from hf_sketch.recipes.dimension.arguments import (
    DimensionArguments,
    DimensionTrainingArguments,
    with_small_search,
)
from hf_sketch.recipes.dimension.metric_scripts import load_metric
from hf_sketch.recipes.dimension.report import save_run
from hf_sketch.recipes.dimension.runs import Task, run_dimension
from hf_sketch.recipes.setups import first_rows, snli_setup
from hf_sketch.recipes.small_settings import with_small
from hf_sketch.recipes.texts.snli_data import load_snli
from hf_sketch.recipes.texts.snli_sample import load_snli_sample, tokenize


@dataclass
class SnliArguments(DimensionArguments):
    """Search for the intrinsic dimension of RoBERTa on SNLI.

    Defaults are the paper's. It does not give the dimensions at which the search begins
    and ends: 2^10 and 2^14 are those that its 10,000 steps have stages for. Accuracy is
    a fraction here. The paper's least improvement of 0.1 has no unit; it is taken as
    0.1 points, 0.001, because stages that gain less than 10 points would all double.
    """

    max_length: int | None = field(
        default=128, metadata={"help": "Tokens of a pair that are kept."}
    )


@dataclass
class SnliTrainingArguments(DimensionTrainingArguments):
    """The Trainer's settings, by default the paper's: Adam with a constant rate."""

    output_dir: str = field(
        default="out/snli", metadata={"help": "Where all results go."}
    )


_SMALL = {"baseline_steps": 100, "baseline_learning_rate": 1e-4}
_SMALL |= {"start_dim": 2**10, "max_dim": 2**14, "stage_steps": 25}
_SMALL |= {"max_length": 48, "max_eval_samples": 300, "min_improvement": 0.01}
_SMALL_TRAINING = {"max_steps": 300, "learning_rate": 1e-3, "save_steps": 50}
_SMALL_TRAINING |= {"per_device_train_batch_size": 16, "dataloader_pin_memory": False}


def run_snli(
    arguments: SnliArguments, training: SnliTrainingArguments
) -> DimensionSearch:
    """Search, print, and save numbers, a plot, the adapter and its model card.

    Raises:
        ModuleNotFoundError: the extra `recipes` is not installed, or with `small` the
            package with the model.
        ValueError: an argument or a file is bad, or full fine-tuning does not reach
            the target.
    """
    if arguments.small:
        arguments = with_small_search(arguments, _SMALL)
        training = with_small(training, _SMALL_TRAINING)
    set_seed(training.seed)
    task = snli_task(arguments)
    run = run_dimension(task, arguments, training)
    save_run("snli", task, arguments, training, run)
    return run.search


def snli_task(arguments: SnliArguments) -> Task:
    """The classifier, its data and accuracy."""
    config: dict[str, Any] = {}
    if arguments.num_hidden_layers is not None:
        config["num_hidden_layers"] = arguments.num_hidden_layers
    setup = snli_setup(
        arguments.model_name_or_path,
        arguments.train_file,
        arguments.small,
        arguments.max_length,
        arguments.max_train_samples,
        **config,
    )
    file = arguments.validation_file
    sample = arguments.small and file is None
    rows = load_snli_sample("validation") if sample else load_snli("validation", file)
    rows = first_rows(rows, arguments.max_eval_samples)
    accuracy = load_metric("accuracy")

    def compute_metrics(result: EvalPrediction) -> dict[str, float]:
        logits = result.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return accuracy.compute(
            predictions=np.argmax(logits, axis=-1), references=result.label_ids
        )

    eval_dataset = tokenize(rows, setup.tokenizer, arguments.max_length)
    return Task(setup, eval_dataset, compute_metrics, ("eval_accuracy",))


if __name__ == "__main__":
    parser = HfArgumentParser((SnliArguments, SnliTrainingArguments))
    run_snli(*parser.parse_args_into_dataclasses())
