"""Examples whose labels are all ignored: their rows and weights are zero."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.own_gradients import assert_rows_are_own, resting_trainer
from tests.helpers.tiers import full
from tests.helpers.trained.text_training import undropped
from tests.helpers.trained.tiny_models import tiny_inputs
from tests.helpers.trained.trl_training import (
    needs_trl,
    number_of,
    texts,
    tokenizer,
    trl_trainer,
)

FIRST_BATCH, SCATTERED, LATE = {0, 1, 2, 4}, {1, 4}, {7}


def examples_of(name, without):
    """Nine examples of a family's batches."""
    parts = [tiny_inputs(name, seed) for seed in range(3)]
    batch = {key: torch.cat([part[key] for part in parts])[:9] for key in parts[0]}
    batch["labels"][sorted(without)] = -100
    rows = [{key: x[index].tolist() for key, x in batch.items()} for index in range(9)]
    return rows


@pytest.mark.parametrize(
    ("name", "without", "settings"),
    [
        ("gpt2", FIRST_BATCH, {}),
        ("bert", FIRST_BATCH, {}),
        ("gpt2", SCATTERED, {"gradient_accumulation_steps": 2}),
        *full(
            ("llama", SCATTERED, {}),
            ("bert for masked words", FIRST_BATCH, {}),
            ("bert for tokens", FIRST_BATCH, {}),
            ("t5", FIRST_BATCH, {}),
            ("bart", SCATTERED, {"gradient_accumulation_steps": 2}),
            ("bert", SCATTERED, {"gradient_accumulation_steps": 2}),
        ),
    ],
)
def test_rows_of_examples_without_labels_are_zero(tmp_path, name, without, settings):
    trainer = resting_trainer(
        tmp_path, undropped(name), examples_of(name, without), **settings
    )
    trainer.train()
    store = assert_rows_are_own(trainer, without)
    losses = dict(zip(store.dataset["example_id"], store.dataset["loss"], strict=True))
    assert all(losses[index] == 0 for index in without)
    assert store.measured_error.examples > 0


@pytest.mark.parametrize("without", [LATE, *full(FIRST_BATCH, SCATTERED)])
def test_answers_outside_the_tokens_are_left_out(tmp_path, without):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    drops = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    config = AutoConfig.for_model("bert", **settings, **dict.fromkeys(drops, 0.0))
    examples = examples_of("bert", ())
    for index, example in enumerate(examples):
        del example["labels"]
        length = len(example["input_ids"])
        example["start_positions"] = length + 3 if index in without else index % 3
        example["end_positions"] = length if index in without else 3
    model = AutoModelForQuestionAnswering.from_config(config)
    trainer = resting_trainer(tmp_path, model, examples)
    trainer.train()
    store = assert_rows_are_own(trainer, without)
    assert not torch.tensor(store.dataset["loss"][:]).isnan().any()


def shares(trainer):
    """The share of each example in the first step's loss, summed as the rows are."""
    store = load_sketches(trainer.args.output_dir)
    rows = store.dataset.with_format("torch")[:]
    for step in store.steps.with_format("torch"):
        chosen = rows["step"] == step["step"]
        total = rows["weight"][chosen].float() @ rows["sketch"][chosen]
        assert (total - step["sketch"]).norm() <= 1e-4 * step["sketch"].norm()
    return rows


def assert_without(rows, without):
    """The rows and weights of some examples are zero, and of no others."""
    for index, row, weight in zip(
        rows["example_id"].tolist(), rows["sketch"], rows["weight"], strict=True
    ):
        assert bool(row.any()) == (index not in without)
        if index in without:
            assert weight == 0
        elif rows["loss"].isnan().all():  # of shares all have the same
            assert float(weight) == pytest.approx(1 / 3)
        else:
            assert weight > 0
    assert rows["finite"].all()


@pytest.mark.parametrize("without", [FIRST_BATCH, *full(SCATTERED)])
def test_smoothed_labels_that_are_ignored_have_no_weight(tmp_path, without):
    trainer = resting_trainer(
        tmp_path,
        undropped("gpt2"),
        examples_of("gpt2", without),
        label_smoothing_factor=0.1,
    )
    with pytest.warns(UserWarning, match="computed outside the model"):
        trainer.train()
    assert_without(shares(trainer), without)


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("without", "settings"),
    [
        (FIRST_BATCH, {}),
        *full(
            (SCATTERED, {"loss_type": "dft"}),
            (FIRST_BATCH, {"padding_free": True, "max_length": None}),
            (SCATTERED, {"label_smoothing_factor": 0.1, "loss_type": "nll"}),
        ),
    ],
)
def test_fused_heads_leave_them_out(tmp_path, without, settings):
    callback = GradientSketchCallback(64)
    trainer = trl_trainer(tmp_path, "SFT", texts(9), callback, **settings)
    collate, words = trainer.data_collator, tokenizer()

    def ignoring(examples):
        batch = collate(examples)
        padded = len(batch["labels"]) == len(examples)
        start = 0
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            if number_of(words.decode(example["input_ids"])) in without:
                own = batch["labels"][row if padded else 0]
                own[0 if padded else start : None if padded else start + length] = -100
            start += length
        return batch

    trainer.data_collator = ignoring
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    trainer.train()
    assert_without(shares(trainer), without)
