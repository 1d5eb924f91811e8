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
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sketch.recipes.demo import embedded_model_path
from hf_sketch.recipes.snli_data import load_snli
from hf_sketch.recipes.snli_sample import LABELS, load_snli_sample, tokenize
from hf_sketch.recipes.xsum_data import (
    load_short_documents,
    load_xsum,
    tokenize_summaries,
)


@dataclass(frozen=True)
class Setup:
    """What a Trainer needs.

    Args:
        name: of the model and the task.
        model: to fine-tune.
        tokenizer: of the model.
        train_dataset: tokenized.
        collator: makes a batch of its rows.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]


def snli_setup(model: str | None, train_file: str | None, small: bool) -> Setup:
    """A classifier of three classes with SNLI's training pairs.

    Args:
        model: name or folder; by default roberta-base, MiniLM if `small`.
        train_file: premise, hypothesis, label; by default the Hub's rows.
        small: the bundled sample instead of the Hub's rows.
    """
    name = model or (embedded_model_path() if small else "FacebookAI/roberta-base")
    tokenizer = AutoTokenizer.from_pretrained(name)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(LABELS)
    )
    if tokenizer.pad_token is None:  # GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    sample = small and train_file is None
    rows = load_snli_sample("train") if sample else load_snli("train", train_file)
    return Setup(
        name=f"{'MiniLM' if small and model is None else Path(name).name} on SNLI",
        model=classifier,
        tokenizer=tokenizer,
        train_dataset=tokenize(rows, tokenizer),
        collator=DataCollatorWithPadding(tokenizer),
    )


def xsum_setup(
    model: str | None,
    train_file: str | None,
    small: bool,
    max_source_length: int = 512,
    max_target_length: int = 64,
) -> Setup:
    """An encoder-decoder with XSum's training documents.

    Args:
        model: name or folder; by default facebook/bart-base, a tiny BART with random
            weights if `small`.
        train_file: document, summary; by default the Hub's rows.
        small: eight short documents of our own instead of the Hub's rows.
        max_source_length: tokens of a document that are kept.
        max_target_length: tokens of a summary that are kept.
    """
    tiny = small and model is None
    name = model or ("tiny BART" if small else "facebook/bart-base")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path() if tiny else name)
    if tiny:
        seq2seq = _tiny_bart(tokenizer)
    else:
        seq2seq = AutoModelForSeq2SeqLM.from_pretrained(name)
    own = small and train_file is None
    rows = load_short_documents() if own else load_xsum("train", train_file)
    return Setup(
        name=f"{Path(name).name} on {'short documents' if own else 'XSum'}",
        model=seq2seq,
        tokenizer=tokenizer,
        train_dataset=tokenize_summaries(
            rows, tokenizer, max_source_length, max_target_length
        ),
        collator=DataCollatorForSeq2Seq(tokenizer, seq2seq),
    )


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
