"""Section 5.4 of the paper: the intrinsic dimension of a summarizer on XSum."""

from typing import Any

import numpy as np
from transformers import EvalPrediction, HfArgumentParser, Seq2SeqTrainingArguments

from hf_sketch import DimensionSearch
from hf_sketch.recipes.dimension.metric_scripts import load_metric
from hf_sketch.recipes.dimension.recipe import DimensionRecipe
from hf_sketch.recipes.dimension.runs import Task
from hf_sketch.recipes.options.dimension import XSUM_TRAINING, XsumArguments
from hf_sketch.recipes.setups import first_rows, xsum_setup
from hf_sketch.recipes.texts.xsum_data import (
    load_xsum,
    own_summaries,
    tokenize_summaries,
)
from hf_sketch.recipes.training_defaults import with_defaults

XsumTrainingArguments = with_defaults(
    Seq2SeqTrainingArguments, XSUM_TRAINING, "XsumTrainingArguments", __name__
)

_SMALL = {"baseline_steps": 60, "baseline_learning_rate": 3e-3}
_SMALL |= {"start_dim": 2**4, "max_dim": 2**10, "stage_steps": 10}
_SMALL |= {"max_source_length": 64, "max_target_length": 24, "max_eval_samples": 8}
_SMALL_TRAINING = {"max_steps": 150, "learning_rate": 3e-3, "save_steps": 50}
_SMALL_TRAINING |= {"per_device_train_batch_size": 8, "generation_max_length": 24}
_SMALL_TRAINING |= {"dataloader_pin_memory": False}


def xsum_task(arguments: XsumArguments) -> Task:
    """The encoder-decoder, its data and ROUGE."""
    lengths = arguments.max_source_length, arguments.max_target_length
    setup = xsum_setup(
        arguments.model_name_or_path,
        arguments.train_file,
        arguments.small,
        *lengths,
        max_samples=arguments.max_train_samples,
        num_hidden_layers=arguments.num_hidden_layers,
        encoder_decoder=arguments.encoder_decoder,
    )
    file = arguments.validation_file
    own = arguments.small and file is None
    rows = own_summaries("validation") if own else load_xsum("validation", file)
    rows = first_rows(rows, arguments.max_eval_samples)
    rouge = load_metric("rouge")

    def texts_of(tokens: np.ndarray) -> list[str]:
        # The Trainer pads with -100, which is no token.
        known = np.where(tokens < 0, setup.tokenizer.pad_token_id, tokens)
        return setup.tokenizer.batch_decode(known, skip_special_tokens=True)

    def compute_metrics(result: EvalPrediction) -> dict[str, float]:
        return rouge.compute(
            predictions=texts_of(result.predictions),
            references=texts_of(result.label_ids),
        )

    eval_dataset = tokenize_summaries(rows, setup.tokenizer, *lengths)
    metrics = tuple(f"eval_{kind}" for kind in ("rouge1", "rouge2", "rougeL"))
    return Task(setup, eval_dataset, compute_metrics, metrics)


_RECIPE = DimensionRecipe("xsum", xsum_task, _SMALL, _SMALL_TRAINING)


def run_xsum(arguments: XsumArguments, training: Any) -> DimensionSearch:
    """Search for the intrinsic dimension; see `DimensionRecipe.run`."""
    return _RECIPE.run(arguments, training)


if __name__ == "__main__":
    parser = HfArgumentParser((XsumArguments, XsumTrainingArguments))
    run_xsum(*parser.parse_args_into_dataclasses())
