"""Which examples the batches of TRL's trainers are made of."""

import importlib.util

import pytest
import torch
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.trl_training import (
    generating_trainer,
    pairs,
    prompt,
    texts,
    tiny_llama,
    trl_trainer,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="needs the package trl"
    ),
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]
SIZE = 256


@pytest.mark.full
def test_the_rows_of_a_pair_can_be_kept_apart(tmp_path):
    for folder, per_row in (("together", False), ("apart", True)):
        more = {"ref_model": tiny_llama()}
        callback = GradientSketchCallback(SIZE, per_row=per_row)
        directory = tmp_path / folder
        trl_trainer(directory, "DPO", pairs(), callback, more=more).train()
    apart = load_sketches(tmp_path / "apart").dataset.with_format("torch")[:]
    together = load_sketches(tmp_path / "together").dataset.with_format("torch")[:]
    for example in range(6):
        rows = apart["example_id"] == example
        assert apart["part"][rows].tolist() == [0, 1]
        weights = apart["weight"][rows].to(torch.float32)
        total = (weights @ apart["sketch"][rows]) / weights.sum()
        own = together["sketch"][together["example_id"] == example]
        torch.testing.assert_close(total.unsqueeze(0), own)


@pytest.mark.full
@pytest.mark.parametrize(("strategy", "per_row"), [("bfd", True), ("wrapped", False)])
def test_packed_texts_have_a_row_per_packed_example(tmp_path, strategy, per_row):
    callback = GradientSketchCallback(SIZE, per_row=per_row)
    trainer = trl_trainer(
        tmp_path,
        "SFT",
        texts(13),
        callback,
        packing=True,
        packing_strategy=strategy,
        max_length=32 if strategy == "bfd" else 16,
    )
    trainer.train()
    packed, rows = trainer.train_dataset, load_sketches(tmp_path).dataset
    expected = [*range(len(packed))]
    if per_row:
        expected = [i for i in expected for _ in packed[i]["seq_lengths"]]
    assert sorted(rows["example_id"][:]) == expected


@pytest.mark.full
@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_answers_to_conversations_carry_the_id_of_their_prompt(
    tmp_path, steps_per_generation
):
    """The generated batch is shuffled, and cut into the batches of several steps."""
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": prompt(i)}]} for i in range(8)]
    )
    trainer = generating_trainer(
        tmp_path,
        "GRPO",
        GradientSketchCallback(SIZE),
        dataset,
        steps_per_generation=steps_per_generation,
    )
    words, seen = trainer.processing_class, []

    def note(module, args, kwargs):
        if torch.is_grad_enabled() and module.training:
            seen.extend(words.decode(x) for x in kwargs["input_ids"])

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    # Rules are tried on a batch before it is recorded, out of training mode.
    ids = load_sketches(tmp_path).dataset["example_id"][:]
    assert len(ids) == len(seen) > 0
    assert all(prompt(i) in text for i, text in zip(ids, seen, strict=True))
