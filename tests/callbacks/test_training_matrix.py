"""What Trainer users do, one by one: the rows stay those of single examples.

Training runs with a learning rate of zero, so that every recorded row can be compared
with a backward pass of its example alone.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers.data.data_collator import DataCollatorWithFlattening

from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.text_training import (
    LENGTHS,
    SIZE,
    Pad,
    documents,
    text_dataset,
    train,
    undropped,
)
from tests.helpers.trained.tiny_models import tiny_inputs


def alone(model, inputs):
    """The gradients and the loss of one example, by a pass of its own."""
    model.eval().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {
        name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad
    }
    return gradients, float(loss.detach())


def assert_rows_are_single_gradients(store, model, inputs_of, tolerance=1e-4):
    rows = store.dataset.with_format("torch")[:]
    for index, row, loss in zip(
        rows["example_id"].tolist(), rows["sketch"], rows["loss"], strict=True
    ):
        gradients, expected_loss = alone(model, inputs_of(index))
        expected = store.model_sketch.sketch(gradients)
        assert (row - expected).norm() < tolerance * expected.norm()
        assert abs(float(loss) - expected_loss) < tolerance * expected_loss
    assert store.measured_error.row_error < tolerance


def document(index):
    ids = torch.tensor([documents()[index]])
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("gpt2", "right"),
        ("llama", "left"),
        pytest.param("gpt2", "left", marks=pytest.mark.full),
        pytest.param("llama", "right", marks=pytest.mark.full),
    ],
)
def test_token_counts_accumulation_and_epochs_do_not_change_rows(tmp_path, name, side):
    model = undropped(name)
    store = train(
        tmp_path,
        model,
        text_dataset(),
        Pad(side),
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    assert sorted(store.dataset["example_id"][:]) == sorted([*range(10)] * 2)
    # GPT-2 has absolute positions: on the left, padding moves them.
    if (name, side) != ("gpt2", "left"):
        assert_rows_are_single_gradients(store, model, document)
    rows = store.dataset.with_format("torch")[:]
    tokens = torch.tensor(LENGTHS)[rows["example_id"]] - 1
    for step in rows["step"].unique():
        chosen = rows["step"] == step
        expected = tokens[chosen] / tokens[chosen].sum()
        torch.testing.assert_close(rows["weight"][chosen], expected)


def test_a_row_can_be_the_gradient_of_a_sum_over_tokens(tmp_path):
    model = undropped("gpt2")
    callback = GradientSketchCallback(SIZE, loss="sum")
    store = train(tmp_path, model, text_dataset(), Pad(), [callback])
    rows = store.dataset.with_format("torch")[:]
    for index, row, loss in zip(
        rows["example_id"].tolist(), rows["sketch"], rows["loss"], strict=True
    ):
        gradients, mean = alone(model, document(index))
        tokens = LENGTHS[index] - 1
        expected = tokens * store.model_sketch.sketch(gradients)
        assert (row - expected).norm() < 1e-4 * expected.norm()
        assert float(loss) == pytest.approx(tokens * mean, rel=1e-4)


def test_packed_documents_have_a_row_each(tmp_path):
    model = undropped("llama")
    store = train(tmp_path, model, text_dataset(), DataCollatorWithFlattening())
    assert sorted(store.dataset["example_id"][:]) == [*range(10)]
    assert_rows_are_single_gradients(store, model, document)


def test_duplicate_examples_have_a_row_each(tmp_path):
    ids = documents()
    model = undropped("gpt2")
    store = train(tmp_path, model, text_dataset([ids[0], ids[1]] * 3), Pad())
    assert sorted(store.dataset["example_id"][:]) == [*range(6)]
    assert_rows_are_single_gradients(store, model, lambda index: document(index % 2))


def test_a_stream_has_ids_of_its_content(tmp_path):
    model = undropped("gpt2")
    stream = text_dataset().to_iterable_dataset()
    store = train(tmp_path, model, stream, Pad(), max_steps=5, num_train_epochs=2)
    rows = store.dataset.with_format("torch")[:]
    ids = rows["example_id"].tolist()
    assert len(ids) == 18  # 4 + 4 + 2, and 4 + 4 of the second epoch
    assert ids[:8] == ids[10:]
    assert len(set(ids[:10])) == 10
    for place, row in enumerate(rows["sketch"]):
        gradients, _ = alone(model, document(place % 10))
        expected = store.model_sketch.sketch(gradients)
        assert (row - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "reentrant", [pytest.param(False, marks=pytest.mark.full), True]
)
def test_activation_checkpointing(tmp_path, reentrant):
    model = undropped("llama")
    store = train(
        tmp_path,
        model,
        text_dataset(),
        Pad(),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_rows_are_single_gradients(store, model, document)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_of_the_cpu(tmp_path, attention):
    model = undropped("llama", attn_implementation=attention)
    store = train(tmp_path, model, text_dataset(), Pad())
    assert_rows_are_single_gradients(store, model, document)


def test_bf16_autocast(tmp_path):
    model = undropped("llama")
    store = train(tmp_path, model, text_dataset(), Pad(), bf16=True)
    assert_rows_are_single_gradients(store, model, document, tolerance=5e-2)


@pytest.mark.full
def test_bf16_weights(tmp_path):
    model = undropped("llama").to(torch.bfloat16)
    store = train(tmp_path, model, text_dataset(), Pad())
    assert_rows_are_single_gradients(store, model, document, tolerance=5e-2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens"]])
def test_lora(tmp_path, targets):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(undropped("llama"), config)
    store = train(tmp_path, model, text_dataset(), Pad(), [GradientSketchCallback(64)])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert store.model_sketch.in_size == trainable
    assert_rows_are_single_gradients(store, model, document)


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "t5",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("bert", "bart", "bert for masked words")
        ),
    ],
)
def test_other_tasks(tmp_path, name):
    model, inputs = undropped(name), tiny_inputs(name)
    columns = {name: column.tolist() for name, column in inputs.items()}
    store = train(tmp_path, model, Dataset.from_dict(columns))

    def example(index):
        row = {name: column[index : index + 1] for name, column in inputs.items()}
        return {n: x.float() if x.is_floating_point() else x for n, x in row.items()}

    assert len(store.dataset) == 4
    assert_rows_are_single_gradients(store, model, example)
