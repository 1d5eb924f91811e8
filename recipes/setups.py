"""What the paper fine-tunes: classifiers on SNLI, encoder-decoders on XSum."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EncoderDecoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sketch.recipes.texts.entailment import LABELS, load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.texts.xsum_data import (
    load_xsum,
    own_summaries,
    tokenize_summaries,
)


@dataclass(frozen=True)
class Setup:
    """What a Trainer needs.

    Args:
        name: name of the model and the task.
        model: to fine-tune.
        tokenizer: tokenizer of the model.
        train_dataset: tokenized.
        collator: makes a batch of its rows.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]


def snli_setup(
    model: str | None,
    train_file: str | None,
    small: bool,
    max_length: int | None = None,
    max_samples: int | None = None,
    **config: int,
) -> Setup:
    """A classifier of three classes with SNLI's training pairs, or our own.

    Args:
        model: name or folder; by default roberta-base, MiniLM if `small`.
        train_file: premise, hypothesis, label; by default pairs written for this
            project, which a printed line says.
        small: chooses the default model.
        max_length: tokens of a pair that are kept; None for all that fit.
        max_samples: rows that are kept; None for all.
        config: changes to the model's configuration, as num_hidden_layers.
    """
    name = model or (embedded_model_path() if small else "FacebookAI/roberta-base")
    tokenizer = AutoTokenizer.from_pretrained(name)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(LABELS), **config
    )
    if tokenizer.pad_token is None:  # GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    rows = first_rows(load_pairs("train", train_file), max_samples)
    if train_file is None:
        print(
            f"Training on {len(rows):,} pairs written for hf_sketch, not on SNLI: pass "
            "--train_file for that."
        )
    title = "MiniLM" if small and model is None else Path(name).name
    return Setup(
        name=f"{title} on {'entailment pairs' if train_file is None else 'SNLI'}",
        model=classifier,
        tokenizer=tokenizer,
        train_dataset=tokenize(rows, tokenizer, max_length),
        collator=DataCollatorWithPadding(tokenizer),
    )


def xsum_setup(
    model: str | None,
    train_file: str | None,
    small: bool,
    max_source_length: int = 512,
    max_target_length: int = 64,
    max_samples: int | None = None,
    num_hidden_layers: int | None = None,
    encoder_decoder: bool = False,
) -> Setup:
    """An encoder-decoder with XSum's training documents.

    Args:
        model: name or folder; by default facebook/bart-base, a tiny BART with random
            weights if `small`.
        train_file: document, summary; by default the Hub's rows.
        small: 300 short documents of our own instead of the Hub's rows.
        max_source_length: tokens of a document that are kept.
        max_target_length: tokens of a summary that are kept.
        max_samples: rows that are kept; None for all.
        num_hidden_layers: number of layers in the encoder and in the decoder; None for
            all.
        encoder_decoder: make both of an encoder, whose name or folder `model` is.
    """
    tiny = small and model is None
    name = model or ("tiny BART" if small else "facebook/bart-base")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path() if tiny else name)
    if tiny:
        seq2seq = _tiny_bart(tokenizer)
    elif encoder_decoder:
        seq2seq = encoder_twice(name, tokenizer, num_hidden_layers)
    else:
        layers = _layers(("encoder_layers", "decoder_layers"), num_hidden_layers)
        seq2seq = AutoModelForSeq2SeqLM.from_pretrained(name, **layers)
    own = small and train_file is None
    rows = own_summaries("train") if own else load_xsum("train", train_file)
    return Setup(
        name=f"{Path(name).name} on {'short documents' if own else 'XSum'}",
        model=seq2seq,
        tokenizer=tokenizer,
        train_dataset=tokenize_summaries(
            first_rows(rows, max_samples),
            tokenizer,
            max_source_length,
            max_target_length,
        ),
        collator=DataCollatorForSeq2Seq(tokenizer, seq2seq),
    )


def first_rows(rows: Dataset, count: int | None) -> Dataset:
    """Return the first `count` rows, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def encoder_twice(
    name: str, tokenizer: PreTrainedTokenizerBase, num_hidden_layers: int | None
) -> PreTrainedModel:
    """An encoder-decoder of an encoder's weights, with new cross-attention.

    Args:
        name: name or folder of the encoder, as of BERT.
        tokenizer: tokenizer of the encoder.
        num_hidden_layers: number of layers in each; None for all.
    """
    names = ("encoder_num_hidden_layers", "decoder_num_hidden_layers")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        name, name, **_layers(names, num_hidden_layers)
    )
    first = tokenizer.bos_token_id or tokenizer.cls_token_id
    last = tokenizer.eos_token_id or tokenizer.sep_token_id
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = first
        config.eos_token_id = last
        config.pad_token_id = tokenizer.pad_token_id
    return model


def _layers(names: tuple[str, ...], count: int | None) -> dict[str, int]:
    """Changes to a configuration; none if the count is None."""
    return {} if count is None else dict.fromkeys(names, count)


def _tiny_bart(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Random weights, a million of them, most in the embeddings."""
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
        forced_eos_token_id=tokenizer.sep_token_id,
        **sizes,
    )
    return BartForConditionalGeneration(config)
