"""Which examples the batches of TRL's trainers are made of."""

import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.trl_training import (
    generating_trainer,
    needs_trl,
    pairs,
    prompt,
    texts,
    tiny_llama,
    trl_trainer,
)

pytestmark = [needs_trl, pytest.mark.filterwarnings("ignore")]  # TRL's own
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


def plain_text(text):
    """A text without what depends on where it was cut."""
    return text.lower().replace("##", "").replace(" ", "")


def checksum_reward(prompts, completions, **_):
    texts = [plain_text(a + b) for a, b in zip(prompts, completions, strict=True)]
    return [zlib.crc32(text.encode()) % 100 / 10 for text in texts]


def length_reward(prompts, completions, **_):
    lengths = [
        len(plain_text(a + b)) for a, b in zip(prompts, completions, strict=True)
    ]
    return [float(length) if length % 2 else None for length in lengths]


def group_advantage(own, other):
    """GRPO's: the distance from the mean, in standard deviations of the group."""
    spread = abs(own - other) / 2**0.5
    return (own - other) / 2 / (spread + 1e-4)


def leave_one_out_advantage(own, other):
    return own - other


@pytest.mark.parametrize(
    ("name", "advantage_of"),
    [
        ("GRPO", group_advantage),
        pytest.param("RLOO", leave_one_out_advantage, marks=pytest.mark.full),
    ],
)
def test_answers_have_their_rewards_and_advantages(tmp_path, name, advantage_of):
    trainer = generating_trainer(
        tmp_path,
        name,
        GradientSketchCallback(SIZE),
        steps_per_generation=2,
        reward_weights=[1.0, 0.5],
        more={"reward_funcs": [checksum_reward, length_reward]},
    )
    words, seen = trainer.processing_class, []

    def note(module, args, kwargs):
        if torch.is_grad_enabled() and module.training:
            ids = kwargs["input_ids"]
            seen.extend(words.decode(x, skip_special_tokens=True) for x in ids)

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    store = load_sketches(tmp_path)
    rows = [*store.dataset]
    rewards = [
        a + 0.5 * (b or 0.0)
        for a, b in zip(
            checksum_reward([""] * len(seen), seen),
            length_reward([""] * len(seen), seen),
            strict=True,
        )
    ]
    assert [row["reward"] for row in rows] == pytest.approx(rewards)
    for own in rows:
        (other,) = [
            row["reward"]
            for row in rows
            if row is not own and row["example_id"] == own["example_id"]
        ]
        expected = advantage_of(own["reward"], other)
        assert own["advantage"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    first = store.where(example_id=rows[0]["example_id"])
    found = store.attribute(first, top_k=1)
    assert {"reward", "advantage"} < {*found.column_names}


def test_resumed_training_keeps_the_columns_of_answers(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    callback = GradientSketchCallback(SIZE)
    generating_trainer(tmp_path, "GRPO", callback, **settings).train()
    callback = GradientSketchCallback(SIZE)
    resumed = generating_trainer(tmp_path, "GRPO", callback, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = load_sketches(tmp_path).dataset.with_format("numpy")
    assert set(rows["step"][:]) == {1, 2, 3, 4}
    for name in ("reward", "advantage"):
        assert np.isfinite(rows[name][:]).all()
        assert np.abs(rows[name][:]).max() > 0
    assert "compute_loss" not in vars(resumed)  # nothing is followed any more
