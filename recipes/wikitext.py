"""The passages behind a language model: fine-tune, record, ask, report."""

import importlib.util
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_sketch import load_sketches, load_spectra
from hf_sketch.attribution.record import FILE, AttributionRecord
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.attribute import (
    attribute_texts,
    check_answers,
    method_of,
    print_record,
)
from hf_sketch.recipes.options.wikitext import WIKITEXT_TRAINING, WikitextArguments
from hf_sketch.recipes.setups import first_rows
from hf_sketch.recipes.texts.data_files import check_data_file, read_data_file
from hf_sketch.recipes.texts.text_rows import (
    TextModel,
    load_text_model,
    text_columns,
    tokenized,
)
from hf_sketch.recipes.training_defaults import with_defaults
from hf_sketch.report.page import write_report
from hf_sketch.sketches.choices import check_count

_HUB_ROWS = ("Salesforce/wikitext", "wikitext-2-raw-v1")


WikitextTrainingArguments = with_defaults(
    TrainingArguments, WIKITEXT_TRAINING, "WikitextTrainingArguments", __name__
)


def run_wikitext(
    arguments: WikitextArguments, training: TrainingArguments
) -> AttributionRecord:
    """Train, attribute, print, save and report.

    Raises:
        ValueError: the model is no causal language model, or an argument is bad.
        FileNotFoundError: a file is not there.
    """
    sketches = _checked(arguments, training)
    set_seed(training.seed)
    text_model = load_text_model(arguments.model_name_or_path)
    if text_model.kind != "causal":
        raise ValueError(
            f"the model must be a causal language model, got a {text_model.kind} model:"
            " record it in your own Trainer, and ask with hf-sketch attribute."
        )
    least = arguments.min_words
    train = _passages("train", arguments.train_file, least)
    train = first_rows(train, arguments.max_train_samples)
    queries = _passages("validation", arguments.query_file, least)
    queries = first_rows(queries, arguments.num_queries)
    columns = text_columns(train, text_model.kind)
    inputs = tokenized(train, text_model, columns, arguments.max_length)
    _train(text_model, inputs, sketches, training)
    store = load_sketches(training.output_dir)
    record = attribute_texts(
        store,
        text_model,
        queries,
        train,
        columns,
        max_length=arguments.max_length,
        token_scores=arguments.token_scores,
        method=method_of(store, arguments.method, arguments.damping),
        top_k=arguments.top_k,
        bottom_k=arguments.bottom_k,
    )
    print_record(record)
    record.save(Path(training.output_dir) / FILE)
    if importlib.util.find_spec("matplotlib") is not None:
        print(f"saved {write_report(training.output_dir)}")
    else:
        print("no report: matplotlib is not installed, pip install 'hf-sketch[plot]'")
    return record


def _checked(
    arguments: WikitextArguments, training: TrainingArguments
) -> GradientSketchCallback:
    """Return the callback that records, once all arguments are known to be good.

    Raises:
        ValueError: an argument is bad.
        FileNotFoundError: a file is not there, or no spectrum for influence.
    """
    check_answers(arguments)
    for name in ("num_queries", "max_length"):
        check_count(name, getattr(arguments, name))
    if arguments.max_train_samples is not None:
        check_count("max_train_samples", arguments.max_train_samples)
    for file in (arguments.train_file, arguments.query_file):
        if file is not None:
            check_data_file(file)
    if arguments.method == "influence":
        load_spectra(str(training.output_dir))
    return GradientSketchCallback(out_size=arguments.out_size)


def _train(
    text_model: TextModel,
    inputs: Dataset,
    sketches: GradientSketchCallback,
    training: TrainingArguments,
) -> None:
    """Fine-tune the model and record sketches."""
    trainer = Trainer(
        text_model.model,
        training,
        data_collator=text_model.collator,
        train_dataset=inputs,
        processing_class=text_model.tokenizer,
        callbacks=[sketches],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


def _passages(split: str, file: str | None, min_words: int) -> Dataset:
    """The rows of a file or of the Hub that are long enough."""
    rows: Any = (
        load_dataset(*_HUB_ROWS, split=split) if file is None else read_data_file(file)
    )
    long = rows.filter(
        lambda text: len(text.split()) >= min_words, input_columns="text"
    )
    if not len(long):
        raise ValueError(
            f"some passages must have at least {min_words} words, got none in "
            f"{len(rows)} rows: pass a smaller --min_words."
        )
    return long


if __name__ == "__main__":
    parser = HfArgumentParser((WikitextArguments, WikitextTrainingArguments))
    run_wikitext(*parser.parse_args_into_dataclasses())
