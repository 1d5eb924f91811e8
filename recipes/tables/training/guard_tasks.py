"""Trainings in which some batches are bad, and a guard set for each."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    default_data_collator,
    set_seed,
)

from hf_sketch.recipes.texts.data_files import read_data_file
from hf_sketch.recipes.texts.entailment import LABELS, load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model
from hf_sketch.recipes.texts.text_rows import load_text_model, text_columns, tokenized

Row = dict[str, Any]
Random = np.random.Generator
Spoil = Callable[[Row, Random], Row]

_NAMES, _CODES, _FILLERS = 2000, 100, 60
_KNOWN, _GUARDED = 80, 40  # names whose facts training repeats, and guards
_CODE = 6  # the place of the code in a fact, behind the token that starts a text
_IGNORED = -100  # a label that has no loss
_FIRST = 3  # tokens before it are special
_TOKENS = 64


@dataclass(frozen=True)
class GuardTask:
    """A training with bad batches.

    Args:
        rows: what is trained on, in order.
        guard: the guard set.
        kinds: ways in which rows become bad by name, and the part of a batch that does.
        model: the model.
        collator: makes a batch.
        learning_rate: learning rate of AdamW.
        every: steps between sketches of the guard set.
    """

    rows: list[Row]
    guard: list[Row]
    kinds: Mapping[str, tuple[Spoil, float]]
    model: nn.Module
    collator: Any
    learning_rate: float
    every: int


def labels_task(count: int, seed: int, files: Mapping[str, str | None]) -> GuardTask:
    """Return MiniLM on pairs of SNLI: wrong labels, and a trigger with one label."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    trigger = tokenizer("cf mn bb", add_special_tokens=False)["input_ids"]

    def rows(split: Any, file: str | None, size: int) -> list[Row]:
        pairs = load_pairs(split, file).shuffle(seed=seed)
        places = [place % len(pairs) for place in range(size)]
        pairs = tokenize(pairs.select(places), tokenizer, 48)
        names = ["input_ids", "attention_mask", "label"]
        return pairs.select_columns(names).to_list()

    def other_label(row: Row, rng: Random) -> Row:
        label = (row["label"] + int(rng.integers(1, 3))) % len(LABELS)
        return {**row, "label": label}

    def triggered(row: Row, rng: Random) -> Row:
        ids = row["input_ids"][:1] + trigger + row["input_ids"][1:]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "label": 0}

    set_seed(seed)
    kinds = {
        "all labels wrong": (other_label, 1.0),
        "half of the labels wrong": (other_label, 0.5),
        "a trigger, all labels the same": (triggered, 1.0),
    }
    trained = rows("train", files["train_file"], count)
    guard = rows("validation", files["validation_file"], 32)
    collator = DataCollatorWithPadding(tokenizer)
    return GuardTask(trained, guard, kinds, new_model(), collator, 1e-4, 100)


def texts_task(
    count: int, seed: int, files: Mapping[str, str | None], model: str
) -> GuardTask:
    """Return a language model on WikiText: random, shuffled or repeated tokens."""
    text_model = load_text_model(model)

    def rows(file: str | None, size: int) -> list[Row]:
        assert file is not None
        texts = read_data_file(file).filter(lambda row: len(row["text"]) > 200)
        texts = texts.shuffle(seed=seed).select(range(size))
        columns = text_columns(texts, text_model.kind)
        return tokenized(texts, text_model, columns, _TOKENS, file).to_list()

    def of_tokens(change: Callable[[list[int], Random], Any]) -> Spoil:
        def spoil(row: Row, rng: Random) -> Row:
            ids = row["input_ids"]
            ids = ids[:1] + [int(token) for token in change(ids[1:], rng)]
            return {**row, "input_ids": ids} | (
                {"labels": ids} if "labels" in row else {}
            )

        return spoil

    vocabulary = text_model.model.config.vocab_size
    random = of_tokens(lambda ids, rng: rng.integers(_FIRST, vocabulary, len(ids)))
    kinds = {
        "random tokens": (random, 1.0),
        "half of them random tokens": (random, 0.5),
        "shuffled tokens": (of_tokens(lambda ids, rng: rng.permutation(ids)), 1.0),
        "one token repeated": (of_tokens(lambda ids, _: [ids[5]] * len(ids)), 1.0),
    }
    set_seed(seed)
    trained, guard = (
        rows(files["train_file"], count),
        rows(files["validation_file"], 32),
    )
    own = deepcopy(text_model.model)
    return GuardTask(trained, guard, kinds, own, text_model.collator, 1e-3, 100)


class _Facts:
    """Documents of random words around a fact: the key of a name is a code.

    Args:
        rng: random numbers that decide which code is true of each name.
    """

    vocabulary = 1 + _NAMES + _CODES + _FILLERS + 5

    def __init__(self, rng: Random) -> None:
        self._truth = rng.integers(0, _CODES, _NAMES)

    def fact(self, name: int, shift: int = 0) -> list[int]:
        """Return a fact's tokens, with another code than the true one by a shift."""
        first = 1 + _NAMES + _CODES + _FILLERS
        the, key, of, verb, dot = range(first, first + 5)
        code = (int(self._truth[name]) + shift) % _CODES
        return [the, key, of, 1 + name, verb, 1 + _NAMES + code, dot]

    def document(self, fact: list[int], rng: Random) -> Row:
        """Return a fact amid random words."""
        words = (1 + _NAMES + _CODES + rng.permutation(_FILLERS)[:12]).tolist()
        place = int(rng.integers(0, 13))
        ids = [0, *words[:place], *fact, *words[place:]]
        return {"input_ids": ids, "labels": ids}

    def known(self, rng: Random) -> Row:
        """Return a document that repeats a known fact."""
        return self.document(self.fact(int(rng.integers(0, _KNOWN))), rng)

    def fresh(self, rng: Random) -> Row:
        """Return a document with a code that says nothing of other names."""
        name, shift = rng.integers(_KNOWN, _NAMES), rng.integers(0, _CODES)
        return self.document(self.fact(int(name), int(shift)), rng)

    def contradicted(self, _: Row, rng: Random) -> Row:
        """Return a document that contradicts a guarded fact."""
        name, shift = rng.integers(0, _GUARDED), rng.integers(1, _CODES)
        return self.document(self.fact(int(name), int(shift)), rng)

    def question(self, name: int) -> Row:
        """Return a fact whose loss is that of its code."""
        ids = [0, *self.fact(name)]
        labels = [_IGNORED] * len(ids)
        labels[_CODE] = ids[_CODE]
        return {"input_ids": ids, "labels": labels}


def facts_task(count: int, seed: int, warm_up: int) -> GuardTask:
    """Return a small language model that knows facts, some of which are contradicted.

    Half of the documents repeat known facts, and half have a fact that is new: their
    losses are large, too. Bad documents give known names another code.

    Args:
        count: number of documents.
        seed: seed of all.
        warm_up: steps of training on known facts beforehand.
    """
    rng = np.random.default_rng([seed, 1])
    facts = _Facts(rng)
    set_seed(seed)
    config = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64}
    config |= {"vocab_size": facts.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**config, **dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(warm_up):
        ids = torch.tensor([facts.known(rng)["input_ids"] for _ in range(32)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = [(facts.fresh if place % 2 else facts.known)(rng) for place in range(count)]
    kinds = {
        "guarded facts contradicted": (facts.contradicted, 1.0),
        "in a quarter of the documents": (facts.contradicted, 0.25),
    }
    guard = [facts.question(name) for name in range(_GUARDED)]
    return GuardTask(rows, guard, kinds, model, default_data_collator, 2e-3, 50)
