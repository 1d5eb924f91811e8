"""The batches of spectra: whatever the data are, training never notices."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_sketch import load_spectra
from hf_sketch.callbacks.spectra.batches import draw_batches, tensors_of
from tests.helpers.curvature_oracles import cross_entropy
from tests.helpers.tiers import full
from tests.helpers.trained.hessian_training import (
    assert_trained_alike,
    spectra_callback,
    steps_of,
    stored_batches,
)
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model
from tests.helpers.trained.training import (
    VOCABULARY,
    Interrupt,
    tiny_dataset,
    tiny_trainer,
)

FIRST = {"max_steps": 3, "save_strategy": "no"}


def trained(output_dir, *callbacks, model=None, collator=None, **arguments):
    trainer = tiny_trainer(
        output_dir, *callbacks, model=model, **{**FIRST, **arguments}
    )
    if collator is not None:
        trainer.data_collator = collator
    trainer.train()
    return trainer


def assert_undisturbed(tmp_path, make_model, make_collator, **arguments):
    """Training is the same with and without spectra; return that with."""
    trainers = [
        trained(
            tmp_path / name,
            *callbacks,
            model=make_model(),
            collator=make_collator(),
            **arguments,
        )
        for name, callbacks in (("without", ()), ("with", [spectra_callback((0, 2))]))
    ]
    assert_trained_alike(*trainers)
    assert steps_of(tmp_path / "with") == [0, 2]
    return trainers[1]


@pytest.mark.parametrize("shuffled", [True, *full(False)])
def test_streams_give_their_first_examples_and_are_trained_on_whole(tmp_path, shuffled):
    stream = tiny_dataset().remove_columns("text").to_iterable_dataset()
    if shuffled:
        stream = stream.shuffle(seed=3, buffer_size=9)
    assert_undisturbed(tmp_path, lambda: None, lambda: None, dataset=stream)
    rows = torch.cat([b["input_ids"] for b in stored_batches(tmp_path / "with")])
    first = [example["input_ids"] for example in stream.take(8)]
    assert rows.tolist() == first


def tiny_tokenizer():
    names = ["[PAD]", *(f"w{n}" for n in range(1, VOCABULARY - 1)), "[MASK]"]
    words = {name: number for number, name in enumerate(names)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w1")),
        mask_token="[MASK]",
        pad_token="[PAD]",
    )


@pytest.mark.parametrize("seed", [None, 5])
def test_a_collator_that_masks_words_draws_the_same_masks_for_training(tmp_path, seed):
    texts = tiny_dataset().select_columns(["input_ids", "attention_mask"])
    tokenizer = tiny_tokenizer()
    assert_undisturbed(
        tmp_path,
        lambda: tiny_model(
            "bert for masked words", torch.float32, vocab_size=VOCABULARY
        ),
        lambda: DataCollatorForLanguageModeling(tokenizer, seed=seed),
        dataset=texts,
    )
    for batch in stored_batches(tmp_path / "with"):
        assert (batch["labels"] != -100).any()


class Noisy:
    """Replaces some words, by generators of its own and by all the global ones."""

    def __init__(self):
        self.own = np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)
        self.python = random.Random(1)
        self.torch = torch.Generator().manual_seed(1)

    def collate(self, examples):
        batch = default_data_collator(examples)
        for place in (
            self.own.integers(10),
            self.legacy.randint(10),
            self.python.randrange(10),
            torch.randint(10, (), generator=self.torch),
            np.random.randint(10),
            random.randrange(10),
            torch.randint(10, ()),
        ):
            batch["input_ids"][:, int(place) + 1] = int(place) + 1
        return batch

    __call__ = collate


def test_no_random_number_that_a_collator_draws_is_taken_from_training(tmp_path):
    data = tiny_dataset().remove_columns("text")
    assert_undisturbed(tmp_path, lambda: None, lambda: Noisy().collate, dataset=data)


def language_data(name, rows=12):
    columns = {}
    for seed in range(rows // 4):
        for key, value in tiny_inputs(name, seed).items():
            columns.setdefault(key, []).extend(value.tolist())
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [("gpt2", True), *full(("llama", False), ("t5", True), ("bart", False))],
)
def test_language_models_have_the_mean_loss_over_tokens(tmp_path, name, bf16):
    trainer = assert_undisturbed(
        tmp_path,
        lambda: tiny_model(name, torch.float32),
        lambda: None,
        dataset=language_data(name),
        bf16=bf16,
    )
    model = tiny_model(name, torch.float32)
    batches = stored_batches(tmp_path / "with")
    assert trainer.args.bf16 == bf16
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    total, count = cross_entropy(outputs, batches, shift=name in ("gpt2", "llama"))
    first = load_spectra(tmp_path / "with")[0]
    assert first.loss == pytest.approx(float(total / count), rel=1e-5)
    assert first.sketched.isfinite().all()
    assert first.check.difference < 5e-2


def test_batches_whose_tensors_share_memory_are_kept_apart(tmp_path):
    whole = tiny_inputs("gpt2")
    ids = whole["input_ids"].clamp(min=3)
    batches = [{"input_ids": ids[rows], "labels": ids[rows]} for rows in ([0, 1], [2])]
    batches.append({"input_ids": ids[2:], "labels": ids[2:]})  # views
    callback = spectra_callback((0, 2), batches=batches)
    data, model = language_data("gpt2"), tiny_model("gpt2", torch.float32)
    trained(tmp_path, callback, model=model, dataset=data)
    for stored, given in zip(stored_batches(tmp_path), batches, strict=True):
        assert all(torch.equal(stored[name], given[name]) for name in given)
    assert steps_of(tmp_path) == [0, 2]


def test_a_set_that_is_smaller_than_asked_gives_all_its_examples_once(tmp_path):
    trained(tmp_path, spectra_callback((0,), batches=9, batch_size=5), max_steps=1)
    batches = stored_batches(tmp_path)
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 5, 5, 2]
    numbers = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    assert sorted(numbers.tolist()) == [*range(1, 23)]


def test_many_batches_keep_their_order(tmp_path):
    batches = [
        {k: v[i : i + 1] for k, v in tiny_inputs("bert", seed).items()}
        for seed in range(3)
        for i in range(4)
    ]
    callback = spectra_callback((1,), batches=batches)
    model = tiny_model("bert", torch.float32)
    data = language_data("bert")
    trained(tmp_path, callback, model=model, dataset=data, max_steps=1)
    for stored, given in zip(stored_batches(tmp_path), batches, strict=True):
        assert torch.equal(stored["input_ids"], given["input_ids"])


class WithModel:
    """A collator that holds a model, as for sequence to sequence."""

    def __init__(self, model):
        self.model = model
        self.inner = Noisy()
        self.seen = []

    def __call__(self, examples):
        self.seen.append(self.model)
        return self.inner(examples)


def test_drawing_copies_no_model_and_leaves_all_generators():
    collator = WithModel(torch.nn.Linear(1, 1))
    inner = collator.inner
    data = tiny_dataset().remove_columns("text")
    loader = DataLoader(data, batch_size=4, collate_fn=collator)

    def states():
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            inner.own.bit_generator.state,
            inner.legacy.get_state()[1].tolist(),
            inner.python.getstate(),
            inner.torch.get_state().tolist(),
        ]

    before = states()
    one, other = (draw_batches(loader, 3, 4, seed=2) for _ in range(2))
    for batch, same in zip(one, other, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert states() == before
    assert len(collator.seen) == 6
    assert all(model is collator.model for model in collator.seen)
    assert draw_batches(loader, 3, 4, seed=3)[0]["labels"].shape == (4,)


def test_batches_of_anything_but_tensors_are_refused():
    with pytest.raises(ValueError, match=r"tensors, got list in 'text'\. Leave it"):
        tensors_of({"input_ids": torch.ones(2), "text": ["a", "b"]})


def test_a_run_that_was_killed_before_its_first_spectrum_goes_on(tmp_path):
    callback = spectra_callback((3,))
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, callback, Interrupt(2), save_steps=1).train()
    stored = stored_batches(tmp_path)
    other = spectra_callback((3,), batches=1)
    trainer = tiny_trainer(tmp_path, other, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert steps_of(tmp_path) == [3]
    for one, same in zip(stored_batches(tmp_path), stored, strict=True):
        assert torch.equal(one["input_ids"], same["input_ids"])
