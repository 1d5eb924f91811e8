"""Ids of rows that do not lie in the order in which the sampler drew the examples."""

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.training import RowNotes, tiny_dataset, tiny_trainer

SIZE = 64


def sorting(items):
    """A batch of its examples by length, as packed sequences need it."""
    items = sorted(items, key=lambda item: -sum(item["attention_mask"]))
    return collated(items)


def collated(items):
    batch = {name: torch.tensor([item[name] for item in items]) for name in items[0]}
    batch["labels"] = batch.pop("label")
    return batch


def in_pairs(items):
    """Each example twice, one after the other, the second with its tokens reversed."""
    batch = collated([item for item in items for _ in range(2)])
    batch["input_ids"][1::2, 1:] = batch["input_ids"][1::2, 1:].flip(1)
    batch["attention_mask"][:] = 1
    return batch


class Masking:
    """Hides tokens by chance, of a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, items):
        batch = collated(items)
        hidden = self.generator.random(batch["input_ids"].shape) < 0.5
        hidden[:, 0] = False
        batch["input_ids"][torch.from_numpy(hidden)] = 5
        return batch


def shuffles(trainer):
    """Let a Trainer shuffle each batch that it prepares."""

    class Shuffling(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            order = torch.randperm(len(inputs["labels"]))
            return {name: value[order] for name, value in inputs.items()}

    trainer.__class__ = Shuffling
    return trainer


def trained(directory, collator=collated, shuffled=False, **arguments):
    """The rows' ids, and those of the examples that the model saw."""
    notes = RowNotes()
    trainer = tiny_trainer(directory, notes, GradientSketchCallback(SIZE), **arguments)
    trainer.data_collator = collator
    trainer.train_dataset = tiny_dataset().remove_columns("text")
    (shuffles(trainer) if shuffled else trainer).train()
    return load_sketches(directory).dataset["example_id"][:], notes.rows


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_in_another_order_carry_their_own_ids(tmp_path, shuffled):
    ids, seen = trained(tmp_path, collated if shuffled else sorting, shuffled)
    assert ids == seen
    assert sorted(ids[:22]) == [*range(22)]


def test_a_collator_that_draws_is_left_alone(tmp_path):
    collator, other = Masking(), Masking()
    ids, seen = trained(tmp_path, collator)
    assert ids == seen
    for start in range(0, len(seen), 22):
        sizes = [4, 4, 4, 4, 4, 2]
        assert len(seen[start : start + 22]) == sum(sizes)
        for size in sizes:
            other.generator.random((size, 11))
    state = collator.generator.bit_generator.state
    assert state == other.generator.bit_generator.state


def test_rows_that_fit_no_example_are_refused(tmp_path):
    message = r"Cannot tell which examples the 4 rows .*Shuffling.*per_example=False"
    with pytest.raises(RuntimeError, match=message):
        trained(tmp_path, Masking(), shuffled=True)


def test_rows_of_one_example_add_up(tmp_path):
    ids, seen = trained(tmp_path, in_pairs)
    assert ids == seen[::2]
