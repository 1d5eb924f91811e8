"""Rows of TRL's trainers, beside passes of each example alone."""

import importlib.metadata
import importlib.util
from functools import partial

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.example_shares import ExampleShares, assert_rows_are_shares
from tests.helpers.trained.trl_training import (
    chats,
    completions,
    generating_trainer,
    judged_answers,
    needs_trl,
    number_of,
    pairs,
    ranked_texts,
    reward_model,
    texts,
    tiny_llama,
    tokenizer,
    trl_trainer,
)

pytestmark = [needs_trl, pytest.mark.filterwarnings("ignore")]  # TRL's own
SIZE = 256
PADDING_FREE = {"padding_free": True, "max_length": None}
full = partial(pytest.param, marks=pytest.mark.full)


def lora(**settings):
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    return {"peft_config": LoraConfig(r=4, **settings)}


def assert_rows_of(tmp_path, make, row_of=None, together=True):
    """The rows of a Trainer's examples are their shares of what it trains on.

    `row_of` gives the dataset's row of a number in a text, given another such Trainer.
    """
    words = tokenizer()
    plain = make(tmp_path / "plain", callback=None)

    def example_of(tokens):
        number = number_of(words.decode(tokens))
        return number if row_of is None else row_of(plain, number)

    shares = ExampleShares(plain, example_of, together)
    plain.train()
    make(tmp_path / "rows", callback=GradientSketchCallback(SIZE)).train()
    store = load_sketches(tmp_path / "rows")
    assert_rows_are_shares(store, shares)
    return store


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (texts, {}),
        (completions, PADDING_FREE),
        full(completions, {}),
        full(chats, {"assistant_only_loss": True}),
        full(completions, {"loss_type": "nll"}),
        full(completions, {"loss_type": "dft"}),
        full(texts, {"pad_to_multiple_of": 16}),
        full(texts, {"gradient_accumulation_steps": 2}),
        full(texts, {"gradient_checkpointing": True}),
        full(completions, {**PADDING_FREE, "loss_type": "dft"}),
        full(texts, {**PADDING_FREE, "pad_to_multiple_of": 16}),
    ],
)
def test_fine_tuning_on_texts(tmp_path, dataset, settings):
    make = partial(trl_trainer, name="SFT", dataset=dataset(), **settings)
    assert_rows_of(tmp_path, make)


@pytest.mark.parametrize(
    "more",
    [
        # Used by a fused loss, and not called.
        pytest.param(lora(modules_to_save=["lm_head"]), id="with a head"),
        full(lora(), id="lora"),
        full(
            {"peft_config": PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=20)},
            id="prompt tuning",
        ),
    ],
)
def test_fine_tuning_adapters_on_texts(tmp_path, more):
    make = partial(trl_trainer, name="SFT", dataset=completions(), more=more)
    assert_rows_of(tmp_path, make)


@pytest.mark.parametrize(
    ("per_batch", "settings"),
    [
        (3, {}),
        (1, {"gradient_accumulation_steps": 2}),
        full(3, {"gradient_accumulation_steps": 2}),
        full(3, PADDING_FREE),
        full(3, {"gradient_checkpointing": True}),
        full(3, {"average_tokens_across_devices": False}),
        full(2, {"more": lora()}),
    ],
)
def test_rows_of_texts_are_gradients_of_their_own_mean_losses(
    tmp_path, per_batch, settings
):
    """Whatever other texts are in the batch and in the step."""
    sizes = {"per_device_train_batch_size": per_batch}
    callback = GradientSketchCallback(SIZE)
    trainer = trl_trainer(tmp_path, "SFT", completions(), callback, **settings, **sizes)
    trainer.train()
    store = load_sketches(tmp_path)
    found = store.dataset.with_format("torch")[:]
    # Some versions before return nothing but the batch's loss.
    has_losses = Version(importlib.metadata.version("trl")) >= Version("1.15")
    model, counts = trainer.accelerator.unwrap_model(trainer.model), {}
    for row, example in enumerate(found["example_id"].tolist()):
        tokens = trainer.train_dataset[example]
        ids = torch.tensor([tokens["input_ids"]])
        masked = torch.tensor([tokens.get("completion_mask", 1)]) == 0
        labels = ids.masked_fill(masked, -100)
        labels = torch.tensor([tokens.get("labels", labels[0].tolist())])
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1], labels[0, 1:]
        )
        model.zero_grad()
        loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        expected = store.model_sketch.sketch(named)
        torch.testing.assert_close(found["sketch"][row], expected, rtol=1e-3, atol=1e-4)
        counts[row] = int((labels[0, 1:] != -100).sum())
        if has_losses:
            assert found["loss"][row] == pytest.approx(float(loss), rel=1e-5)
    for step in found["step"].unique():
        rows = (found["step"] == step).nonzero().flatten().tolist()
        total = sum(counts[row] for row in rows)
        for row in rows:
            weight = float(found["weight"][row])
            assert weight == pytest.approx(counts[row] / total, rel=1e-5)
    if settings != PADDING_FREE:
        again = sketch_dataset(trainer=trainer, dataset=trainer.train_dataset)
        rows = again.dataset.with_format("torch")["sketch"][:][found["example_id"]]
        torch.testing.assert_close(rows, found["sketch"], rtol=1e-3, atol=1e-4)


def row_of_packed(trainer, number):
    """The packed example that a text lies in."""
    words = tokenizer()
    for row, tokens in enumerate(trainer.train_dataset["input_ids"]):
        if str(number) in words.decode(tokens).split():
            return row
    return None


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "dft"}, {"pad_to_multiple_of": 64}, {"more": lora()}],
)
def test_fine_tuning_on_packed_texts(tmp_path, settings):
    settings = {"packing": True, "max_length": 32, **settings}
    make = partial(trl_trainer, name="SFT", dataset=texts(13), **settings)
    assert_rows_of(tmp_path, make, row_of_packed)


@pytest.mark.parametrize(
    ("name", "dataset", "settings"),
    [
        ("DPO", pairs, {}),
        ("KTO", judged_answers, {}),  # which calls the model without gradients, too
        ("ORPO", pairs, {"max_length": 32}),  # its batch has no input_ids
        full("CPO", pairs, {"max_length": 32}),
        full("DPO", pairs, {"gradient_accumulation_steps": 2}),
        full("DPO", pairs, {"use_weighting": True}),
        full("DPO", pairs, {"loss_type": "ipo"}),
        full("DPO", pairs, {"loss_type": ["sigmoid", "sft"]}),
        full("DPO", pairs, {"precompute_ref_log_probs": True}),
    ],
)
def test_preferences(tmp_path, name, dataset, settings):
    more = {"ref_model": tiny_llama()} if name in ("DPO", "KTO") else {}
    make = partial(trl_trainer, name=name, dataset=dataset(), more=more, **settings)
    store = assert_rows_of(tmp_path, make)
    weights = torch.tensor(store.dataset["weight"][:])
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize(
    ("name", "dataset", "more"),
    [
        # Without a reference model, the adapters are switched off for one more pass.
        ("DPO", pairs, lora(modules_to_save=["lm_head"])),
        full("DPO", pairs, lora()),
        full("KTO", judged_answers, lora()),
    ],
    ids=["DPO with a head", "DPO", "KTO"],
)
def test_preferences_of_adapters(tmp_path, name, dataset, more):
    make = partial(trl_trainer, name=name, dataset=dataset(), more=more)
    assert_rows_of(tmp_path, make)


@pytest.mark.parametrize("more", [{}, full(lora(task_type="SEQ_CLS"))])
def test_reward_models(tmp_path, more):
    def make(directory, callback):
        model, dataset = reward_model(), ranked_texts()
        return trl_trainer(directory, "Reward", dataset, callback, model, more)

    assert_rows_of(tmp_path, make)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # At a temperature that the model's configuration does not know.
        ("GRPO", {"temperature": 0.7, "entropy_coef": 0.1}),
        full("RLOO", {}),
        full("GRPO", {}),
        full("GRPO", {"beta": 0.1, "num_iterations": 2}),
        full("GRPO", {"gradient_accumulation_steps": 2}),
        full("GRPO", {"temperature": 0.7, "steps_per_generation": 2}),
        full("GRPO", {"top_entropy_quantile": 0.5}),
        full("GRPO", {"loss_type": "grpo"}),
        full("GRPO", {"loss_type": "bnpo"}),
        full("GRPO", {"loss_type": "dr_grpo"}),
        full("GRPO", {"more": lora()}),
        full("RLOO", {"temperature": 0.7, "gradient_accumulation_steps": 2}),
        full("RLOO", {"more": lora()}),
    ],
)
def test_generated_answers(tmp_path, name, settings):
    def make(directory, callback):
        return generating_trainer(directory, name, callback, **settings)

    assert_rows_of(tmp_path, make, together=False)
