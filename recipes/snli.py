"""Section 5.4 of the paper: the intrinsic dimension of a classifier on SNLI."""

from typing import Any

import numpy as np
from transformers import EvalPrediction, HfArgumentParser, Seq2SeqTrainingArguments

from hf_sketch import DimensionSearch
from hf_sketch.recipes.dimension.metric_scripts import load_metric
from hf_sketch.recipes.dimension.recipe import DimensionRecipe
from hf_sketch.recipes.dimension.runs import Task
from hf_sketch.recipes.options.dimension import SNLI_TRAINING, SnliArguments
from hf_sketch.recipes.setups import first_rows, snli_setup
from hf_sketch.recipes.texts.entailment import check_files, load_pairs, tokenize
from hf_sketch.recipes.training_defaults import with_defaults

SnliTrainingArguments = with_defaults(
    Seq2SeqTrainingArguments, SNLI_TRAINING, "SnliTrainingArguments", __name__
)

_SMALL = {"baseline_steps": 100, "baseline_learning_rate": 1e-4}
_SMALL |= {"start_dim": 2**10, "max_dim": 2**14, "stage_steps": 25}
_SMALL |= {"max_length": 48, "max_eval_samples": 300, "min_improvement": 0.01}
_SMALL_TRAINING = {"max_steps": 300, "learning_rate": 1e-3, "save_steps": 50}
_SMALL_TRAINING |= {"per_device_train_batch_size": 16, "dataloader_pin_memory": False}


def snli_task(arguments: SnliArguments) -> Task:
    """The classifier, its data and accuracy.

    Raises:
        ValueError: one of the two files is given without the other.
    """
    check_files(arguments.train_file, arguments.validation_file)
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
    rows = load_pairs("validation", arguments.validation_file)
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


_RECIPE = DimensionRecipe("snli", snli_task, _SMALL, _SMALL_TRAINING)


def run_snli(arguments: SnliArguments, training: Any) -> DimensionSearch:
    """Search for the intrinsic dimension; see `DimensionRecipe.run`."""
    return _RECIPE.run(arguments, training)


if __name__ == "__main__":
    parser = HfArgumentParser((SnliArguments, SnliTrainingArguments))
    run_snli(*parser.parse_args_into_dataclasses())
