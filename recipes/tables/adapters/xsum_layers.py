"""Layers of MiniLM that summarize XSum, as a task of the table of methods."""

from typing import Any, Final

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from hf_sketch.recipes.setups import encoder_twice, first_rows
from hf_sketch.recipes.tables.adapters.task import PeersTask, Rows
from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.texts.xsum_data import (
    load_xsum,
    own_summaries,
    tokenize_summaries,
)

_MAX_SOURCE: Final = 64
_MAX_TARGET: Final = 24


def xsum_task(
    trained_layers: int,
    rows: tuple[int, int, int],
    train_file: str | None = None,
    validation_file: str | None = None,
) -> PeersTask:
    """Make an encoder-decoder, and read the rows.

    The encoder and the decoder are the same layers of MiniLM, with new cross-attention.
    Embeddings, which are also the output layer, stay as they are.

    Args:
        trained_layers: number of layers of the encoder and of the decoder.
        rows: rows of training, at most, of tuning and of the test.
        train_file: XSum's rows; None for our own documents.
        validation_file: the same, for tuning and the test.
    """
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # some weights are new, as they should be
    model: Any = encoder_twice(embedded_model_path(), tokenizer, trained_layers)
    logging.set_verbosity(level)
    for part in (model.encoder, model.decoder):
        part.get_input_embeddings().requires_grad_(False)
    count, tuning, test = rows
    train = _load("train", train_file)
    other = _load("validation", validation_file)
    collator = DataCollatorForSeq2Seq(
        tokenizer, model, padding="max_length", max_length=_MAX_SOURCE
    )
    held = _rows(first_rows(other, tuning + test), collator)
    parts = held.part(slice(tuning)), held.part(slice(tuning, None))
    return PeersTask(model, _rows(first_rows(train, count), collator), *parts)


def _load(split: Any, file: str | None) -> Dataset:
    return own_summaries(split) if file is None else load_xsum(split, file)


def _rows(documents: Dataset, collator: DataCollatorForSeq2Seq) -> Rows:
    """Documents and summaries, tokenized and padded."""
    encoded = tokenize_summaries(
        documents, collator.tokenizer, _MAX_SOURCE, _MAX_TARGET
    )
    columns = ("input_ids", "attention_mask", "labels")
    rows = encoded.select_columns(list(columns))
    found = collator([rows[i] for i in range(len(rows))])
    return Rows({name: found[name] for name in columns})
