"""Losses outside of the model, loss scaling, and curves that stay as they were."""

import functools

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_sketch import ExampleSketcher, ModelSketch, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.losses import example_losses
from hf_sketch.store.contents import describe
from hf_sketch.store.header import read_header
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import FEW, MORE, tiny_inputs, tiny_model
from tests.helpers.trained.training import (
    GradientNotes,
    tiny_batch,
    tiny_bert,
    tiny_trainer,
    undropped_bert,
)

SIZE = 256


def train(tmp_path, name, *callbacks, **config):
    """Three epochs of two batches, with dropout, on a tiny model of a family."""
    model = tiny_model(name, torch.float32, **config).train()
    parts = [tiny_inputs(name, seed) for seed in (1, 2)]
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_dict({key: value.tolist() for key, value in columns.items()})
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return curve, list(model.parameters())


@pytest.mark.parametrize("layout", ["grouped", *full("blocked")])
@pytest.mark.parametrize("name", [*FEW, *full(*MORE)])
def test_training_is_bit_equal_with_and_without(tmp_path, name, layout):
    plain, before = train(tmp_path / "plain", name)
    callback = GradientSketchCallback(SIZE, layout=layout)
    watched, after = train(tmp_path / "watched", name, callback)
    assert plain == watched
    assert len(set(plain)) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(load_sketches(tmp_path / "watched").dataset) == 24


def assert_weighted_rows_are_step_gradients(store, notes):
    rows = store.dataset.with_format("torch")[:]
    for step, gradients in enumerate(notes.gradients, start=1):
        chosen = rows["step"] == step
        total = rows["weight"][chosen].float() @ rows["sketch"][chosen]
        expected = store.model_sketch.sketch(gradients)
        assert (total - expected).norm() < 1e-4 * expected.norm()


def smoothed(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_outside_of_the_model_give_shares(tmp_path, how):
    notes, model = GradientNotes(), undropped_bert()
    trainer = tiny_trainer(
        tmp_path,
        GradientSketchCallback(SIZE),
        notes,
        model=model,
        learning_rate=0.0,
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
        **({how: 0.1} if how == "label_smoothing_factor" else {}),
    )
    if how == "compute_loss_func":
        trainer.compute_loss_func = smoothed
    with pytest.warns(UserWarning, match="computed outside the model"):
        trainer.train()
    store = load_sketches(tmp_path)
    assert_weighted_rows_are_step_gradients(store, notes)
    assert store.measured_error is None
    rows = store.dataset.with_format("torch")[:]
    assert rows["loss"].isnan().all()
    data = trainer.train_dataset
    for index, row in zip(rows["example_id"].tolist(), rows["sketch"], strict=True):
        example = data[index]
        model.zero_grad()
        inputs = {
            n: torch.tensor([example[n]]) for n in ("input_ids", "attention_mask")
        }
        smoothed(model(**inputs), torch.tensor([example["label"]])).backward()
        expected = store.model_sketch.sketch(
            {name: p.grad for name, p in model.named_parameters()}
        )
        assert (row - expected).norm() < 1e-4 * expected.norm()


def test_the_scale_of_an_fp16_loss_is_undone():
    model = tiny_bert().eval()
    sketch = ModelSketch.from_model(model, SIZE)
    rows = []
    for scale in (1.0, 1024.0):
        with ExampleSketcher(model, sketch) as sketcher:
            (scale * model(**tiny_batch()).loss).backward()
            rows.append(sketcher.take(loss_scale=scale))
    torch.testing.assert_close(rows[1].rows, rows[0].rows)
    torch.testing.assert_close(rows[1].weights, rows[0].weights)


def test_a_hook_of_the_loss_may_scale_its_gradient():
    """As those do that DeepSpeed puts on what its engine returns."""
    model = tiny_bert().eval()
    sketch = ModelSketch.from_model(model, SIZE)
    batches = []
    for divisor in (1.0, 2.0):
        with ExampleSketcher(model, sketch) as sketcher:
            loss = model(**tiny_batch()).loss
            loss.register_hook(lambda gradient, divisor=divisor: gradient / divisor)
            loss.backward()
            batches.append(sketcher.take())
    torch.testing.assert_close(batches[1].rows, batches[0].rows)
    torch.testing.assert_close(batches[1].weights, batches[0].weights / 2)


def test_the_balance_of_routers_is_left_out(tmp_path):
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    callback = GradientSketchCallback(SIZE)
    with pytest.warns(UserWarning, match="belongs to no example"):
        train(tmp_path, "mixtral", callback, **settings)
    store = load_sketches(tmp_path)
    assert store.measured_error.row_error < 1e-3
    assert not store.dataset.with_format("torch")[:]["loss"].isnan().any()
    assert "of the norm of the first step's gradient" in describe(tmp_path / "sketches")


def penalised(model, where):
    """A loss with a penalty on weights, which the model or the Trainer adds."""

    def penalty():
        return 0.01 * sum(p.square().sum() for p in model.parameters())

    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        if where == "model" and output.loss is not None:
            output.loss = output.loss + penalty()
        return output

    def compute_loss(compute, *args, **kwargs):
        if where == "head":  # what a head does that lies outside the model
            loss, output = compute(*args, **{**kwargs, "return_outputs": True})
            return loss + 100 * (output.logits @ model.classifier.weight).square().sum()
        return compute(*args, **kwargs) + (penalty() if where == "Trainer" else 0)

    model.forward = forward
    return compute_loss


def train_penalised(tmp_path, where, model, *callbacks):
    settings = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
    settings["gradient_accumulation_steps"] = 1
    trainer = tiny_trainer(
        tmp_path, GradientSketchCallback(SIZE), *callbacks, model=model, **settings
    )
    compute_loss = penalised(model, where)
    trainer.compute_loss = functools.partial(compute_loss, trainer.compute_loss)
    trainer.train()
    return trainer


@pytest.mark.parametrize("where", ["model", "Trainer"])
def test_a_penalty_on_weights_is_left_out_and_its_share_noted(tmp_path, where):
    notes, model = GradientNotes(), undropped_bert()
    with pytest.warns(UserWarning, match="belongs to no example"):
        trainer = train_penalised(tmp_path, where, model, notes)
    del model.forward
    model.eval()
    store = load_sketches(tmp_path)
    rows = store.dataset.with_format("torch")[:]
    data = trainer.train_dataset
    for index, row, loss in zip(
        rows["example_id"].tolist(), rows["sketch"], rows["loss"], strict=True
    ):
        example = data[index]
        inputs = {
            n: torch.tensor([example[n]]) for n in ("input_ids", "attention_mask")
        }
        inputs["labels"] = torch.tensor([example["label"]])
        assert_row_is_own(store, model, inputs, row, loss)
    (gradient,) = notes.gradients
    step = store.model_sketch.sketch(gradient)
    names = [name for name, _ in model.named_parameters()]
    penalty = store.model_sketch.sketch(
        {n: 0.02 * p.detach() for n, p in zip(names, model.parameters(), strict=True)}
    )
    header = read_header(tmp_path / "sketches")
    assert header.unowned == pytest.approx(
        float(penalty.norm() / step.norm()), rel=1e-3
    )
    assert store.measured_error.row_error < 1e-3


def assert_row_is_own(store, model, inputs, row, loss):
    model.zero_grad()
    own = model(**inputs).loss
    own.backward()
    torch.testing.assert_close(loss, own.detach(), rtol=1e-5, atol=1e-6)
    expected = store.model_sketch.sketch(
        {name: p.grad for name, p in model.named_parameters()}
    )
    assert (row - expected).norm() < 1e-4 * expected.norm()


def test_weights_that_multiply_outputs_are_no_penalty(tmp_path):
    with pytest.raises(RuntimeError, match="do not add up to the step's gradient"):
        train_penalised(tmp_path, "head", undropped_bert())


def test_batch_normalisation_is_refused(tmp_path):
    model = tiny_bert().eval()  # as from_pretrained gives it; training starts later
    normalized = torch.nn.BatchNorm1d(32).eval()
    model.classifier = torch.nn.Sequential(normalized, model.classifier)
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), model=model)
    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        trainer.train()


def test_a_batch_normalisation_that_is_never_called_is_no_reason_to_refuse():
    model = tiny_bert().train()
    model.classifier.spare = torch.nn.BatchNorm1d(32).requires_grad_(False)
    with ExampleSketcher(model, ModelSketch.from_model(model, SIZE)) as sketcher:
        model(**tiny_batch()).loss.backward()
        assert sketcher.take().rows.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_that_autocast_rounded_is_split_and_no_other(half):
    """CUDA's autocast takes cross-entropy from log-probabilities of 16 bits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 3
    rounded = torch.randn(8, 3, generator=generator).to(half)
    loss = functional.nll_loss(rounded.log_softmax(-1).float(), labels)
    logits = rounded.float()
    expected = functional.cross_entropy(logits, labels, reduction="none")
    assert abs(loss - expected.mean()) > 3e-5  # too far for float32
    torch.testing.assert_close(example_losses(loss, logits, labels).losses, expected)
    smoothed = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    unrounded = logits + 1e-6 * torch.randn(8, 3, generator=generator)
    for bad in ((smoothed, logits), (loss, unrounded)):
        with pytest.raises(ValueError, match="a mean of the examples' own losses"):
            example_losses(*bad, labels)
