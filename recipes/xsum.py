"""Section 5.4 of the paper: the intrinsic dimension of a summarizer on XSum."""

from dataclasses import dataclass, field

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
from hf_sketch.recipes.setups import first_rows, xsum_setup
from hf_sketch.recipes.small_settings import with_small
from hf_sketch.recipes.texts.xsum_data import (
    load_short_documents,
    load_xsum,
    tokenize_summaries,
)


@dataclass
class XsumArguments(DimensionArguments):
    """Search for the intrinsic dimension of BART on XSum.

    Defaults are the paper's. It does not give the dimensions at which the search begins
    and ends, 2^7 and 2^26 here, nor the rows that are summarized in an evaluation and
    their lengths. ROUGE counts from 0 to 100.
    """

    start_dim: int = field(
        default=2**7, metadata={"help": "The dimension that the search begins with."}
    )
    max_dim: int = field(
        default=2**26, metadata={"help": "Of the fixed subspace that it grows in."}
    )
    metric: str = field(
        default="eval_rouge1",
        metadata={"help": "eval_rouge1, eval_rouge2 or eval_rougeL."},
    )
    min_improvement: float = field(
        default=0.5, metadata={"help": "A stage that improves ROUGE by less doubles."}
    )
    baseline_steps: int = field(
        default=20_000, metadata={"help": "Of full fine-tuning."}
    )
    max_eval_samples: int | None = field(
        default=500, metadata={"help": "Documents summarized in an evaluation."}
    )
    max_source_length: int = field(
        default=512, metadata={"help": "Tokens of a document that are kept."}
    )
    max_target_length: int = field(
        default=64, metadata={"help": "Tokens of a summary that are kept."}
    )
    encoder_decoder: bool = field(
        default=False,
        metadata={
            "help": "model_name_or_path is an encoder, of which both an encoder and a "
            "decoder are made."
        },
    )


@dataclass
class XsumTrainingArguments(DimensionTrainingArguments):
    """The Trainer's settings, by default the paper's: Adam with a constant rate."""

    output_dir: str = field(
        default="out/xsum", metadata={"help": "Where all results go."}
    )
    max_steps: int = field(default=40_000, metadata={"help": "Of the search."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "ROUGE is of generated summaries."}
    )
    generation_max_length: int | None = field(
        default=64, metadata={"help": "Tokens of a generated summary."}
    )
    generation_num_beams: int | None = field(
        default=1, metadata={"help": "Beams that generation keeps."}
    )


_SMALL = {"baseline_steps": 60, "baseline_learning_rate": 3e-3}
_SMALL |= {"start_dim": 2**4, "max_dim": 2**10, "stage_steps": 10}
_SMALL |= {"max_source_length": 64, "max_target_length": 24, "max_eval_samples": 8}
_SMALL_TRAINING = {"max_steps": 150, "learning_rate": 3e-3, "save_steps": 50}
_SMALL_TRAINING |= {"per_device_train_batch_size": 8, "generation_max_length": 24}
_SMALL_TRAINING |= {"dataloader_pin_memory": False}


def run_xsum(
    arguments: XsumArguments, training: XsumTrainingArguments
) -> DimensionSearch:
    """Search, print, and save numbers, a plot, the adapter and its model card.

    Raises:
        ModuleNotFoundError: the extra `recipes` is not installed, or with `small` the
            package with the tokenizer.
        ValueError: an argument or a file is bad, or full fine-tuning does not reach
            the target.
    """
    if arguments.small:
        arguments = with_small_search(arguments, _SMALL)
        training = with_small(training, _SMALL_TRAINING)
    set_seed(training.seed)
    task = xsum_task(arguments)
    run = run_dimension(task, arguments, training)
    save_run("xsum", task, arguments, training, run)
    return run.search


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
    rows = load_short_documents() if own else load_xsum("validation", file)
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


if __name__ == "__main__":
    parser = HfArgumentParser((XsumArguments, XsumTrainingArguments))
    run_xsum(*parser.parse_args_into_dataclasses())
