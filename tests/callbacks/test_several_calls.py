"""Rows where a loss is made of several calls of the model.

Training runs with a learning rate of zero, so that every recorded row can be compared
with the Trainer's own loss of its example alone.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.several_calls import (
    ROWS,
    SIZE,
    column,
    in_parts,
    merged,
    over_pairs,
    padded,
    preference,
    product,
    score,
    texts,
    trainer_of,
    twice,
)
from tests.helpers.trained.text_training import undropped
from tests.helpers.trained.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The loss is computed outside")


def alone(trainer, item, sketch):
    """The sketch of the gradient of one example's loss, and the loss."""
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator([item]))
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sketch.sketch(named)


def assert_rows_are_of_their_examples(trainer, tolerance=1e-4):
    store = load_sketches(trainer.args.output_dir)
    rows = store.dataset.with_format("torch")[:]
    assert sorted(rows["example_id"].tolist()) == [*range(ROWS)]
    for index, row in zip(rows["example_id"].tolist(), rows["sketch"], strict=True):
        expected = alone(trainer, trainer.train_dataset[index], store.model_sketch)
        assert (row - expected).norm() < tolerance * expected.norm()
    return store


def assert_weighted_rows_are_steps(store):
    rows, steps = (x.with_format("torch")[:] for x in (store.dataset, store.steps))
    for step, expected in zip(steps["step"], steps["sketch"], strict=True):
        chosen = rows["step"] == step
        total = rows["weight"][chosen].float() @ rows["sketch"][chosen]
        assert (total - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("loss", [preference, merged, in_parts])
def test_rows_of_several_calls_are_those_of_their_examples(tmp_path, loss):
    trainer = trainer_of(tmp_path, loss)
    trainer.train()
    store = assert_rows_are_of_their_examples(trainer)
    assert_weighted_rows_are_steps(store)


def test_losses_that_the_model_computes_in_several_calls_add_up(tmp_path):
    trainer = trainer_of(tmp_path, twice, undropped("bert"))
    trainer.train()
    store = load_sketches(tmp_path)
    assert_weighted_rows_are_steps(store)
    rows = store.dataset.with_format("torch")[:]
    for index, row, loss, weight in zip(
        *(rows[name] for name in ("example_id", "sketch", "loss", "weight")),
        strict=True,
    ):
        item = trainer.train_dataset[int(index)]
        expected = alone(trainer, item, store.model_sketch) / 1.5
        assert (row - expected).norm() < 1e-4 * expected.norm()
        inputs = column(padded([item]), "first")
        labels = inputs["input_ids"][:, 0] % 3
        with torch.no_grad():
            whole = trainer.model(**inputs, labels=labels).loss
            inputs["attention_mask"][:, 1] = 0
            cut = trainer.model(**inputs, labels=labels).loss
        assert float(loss) == pytest.approx(float(whole + 0.5 * cut) / 1.5, rel=1e-4)
        assert float(weight) in (pytest.approx(1.5 / 4), pytest.approx(1.5 / 2))


def test_the_number_of_calls_may_change_from_step_to_step(tmp_path):
    trainer = trainer_of(tmp_path, None)

    def loss(model, batch):
        return product(model, batch, 1 + trainer.state.global_step % 3)

    trainer.make_loss = loss
    trainer.train()
    store = load_sketches(tmp_path)
    rows = store.dataset.with_format("torch")[:]
    assert len(rows["step"].unique()) == 3
    for index, row, step in zip(
        rows["example_id"].tolist(), rows["sketch"], rows["step"].tolist(), strict=True
    ):
        trainer.state.global_step = step - 1
        expected = alone(trainer, trainer.train_dataset[index], store.model_sketch)
        assert (row - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "reentrant", [True, pytest.param(False, marks=pytest.mark.full)]
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_layers_that_run_again_know_the_call_that_they_are_of(tmp_path, reentrant):
    """All that trains is within the layers, and the calls are of different sizes."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(undropped("llama"), config)
    model.enable_input_require_grads()
    trainer = trainer_of(
        tmp_path,
        merged,
        model,
        GradientSketchCallback(64),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    assert_rows_are_of_their_examples(trainer)


def test_rows_of_each_call_can_be_kept_apart(tmp_path):
    callback = GradientSketchCallback(SIZE, per_row=True)
    trainer = trainer_of(tmp_path, preference, callback=callback)
    trainer.train()
    store = load_sketches(tmp_path)
    assert_weighted_rows_are_steps(store)
    rows = store.dataset.with_format("torch")[:]
    assert rows["part"].bincount().tolist() == [ROWS, ROWS]
    for index in range(ROWS):
        own = rows["sketch"][rows["example_id"] == index]
        item = trainer.train_dataset[index]
        expected = alone(trainer, item, store.model_sketch)
        assert (own.mean(0) - expected).norm() < 1e-4 * expected.norm()


def test_examples_of_a_stream_have_one_row_of_all_calls(tmp_path):
    stream = texts().to_iterable_dataset()
    trainer = trainer_of(tmp_path, preference, data=stream, max_steps=3)
    trainer.train()
    store = load_sketches(tmp_path)
    rows = store.dataset.with_format("torch")[:]
    assert len(rows["example_id"].unique()) == ROWS
    for row, item in zip(rows["sketch"], texts(), strict=True):
        expected = alone(trainer, item, store.model_sketch)
        assert (row - expected).norm() < 1e-4 * expected.norm()


def test_training_is_bit_equal_with_and_without(tmp_path):
    curves = []
    for name, callbacks in (("plain", False), ("watched", True)):
        dropped = tiny_model("bert", torch.float32)
        trainer = trainer_of(
            tmp_path / name, twice, dropped, learning_rate=1e-2, logging_steps=1
        )
        if not callbacks:
            trainer.pop_callback(GradientSketchCallback)
        trainer.train()
        curves.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
        curves.append([p.tolist() for p in trainer.model.parameters()])
    assert curves[:2] == curves[2:]
    assert len(set(curves[0])) == 3
    assert_weighted_rows_are_steps(load_sketches(tmp_path / "watched"))


def test_a_loss_over_pairs_is_refused_before_rows_are_written(tmp_path):
    trainer = trainer_of(tmp_path, over_pairs)
    message = r"SeveralCalls\.compute_loss compares them: .*per_example=False"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len(load_sketches(tmp_path).dataset) == 0


def test_a_call_after_the_backward_pass_is_refused(tmp_path):
    def cached(model, batch):
        score(model, column(batch, "first")).mean().backward()
        return score(model, column(batch, "second")).mean()

    trainer = trainer_of(tmp_path, cached)
    with pytest.raises(RuntimeError, match=r"before one backward pass, .*per_example"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_dry_run_refuses_a_loss_over_pairs(tmp_path):
    trainer = trainer_of(tmp_path, over_pairs)
    with pytest.raises(ValueError, match=r"compute_loss compares them"):
        GradientSketchCallback.dry_run(trainer)
    trainer.make_loss = preference
    GradientSketchCallback.dry_run(trainer)


def test_shares_of_a_loss_over_pairs_are_recorded_if_nothing_is_compared(tmp_path):
    callback = GradientSketchCallback(SIZE, measure_error=False)
    trainer = trainer_of(tmp_path, over_pairs, callback=callback)
    trainer.train()
    assert_weighted_rows_are_steps(load_sketches(tmp_path))


def test_the_check_of_a_loss_is_not_read_as_its_backward_pass(tmp_path):
    """The loss is divided by the number of micro-batches only after the check."""
    trainer = trainer_of(tmp_path, preference, gradient_accumulation_steps=2)
    trainer.train()
    assert_weighted_rows_are_steps(load_sketches(tmp_path))
