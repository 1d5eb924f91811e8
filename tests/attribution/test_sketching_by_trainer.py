"""Queries by a Trainer's own collator, columns and loss."""

import pytest
import torch
from transformers import Trainer

from hf_sketch import ModelSketch, load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.own_gradients import own
from tests.helpers.trained.training import tiny_bert, tiny_dataset, tiny_trainer


class Doubled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return 2 * model(**inputs).loss


def focal(outputs, labels, num_items_in_batch=None):
    """A loss outside the model, the mean of the examples' own."""
    chances = outputs.logits.softmax(-1).gather(1, labels[:, None])
    return ((1 - chances) ** 2 * -chances.log()).mean()


def trainer_of(directory, *callbacks, loss=None, **arguments):
    trainer = tiny_trainer(
        directory,
        *callbacks,
        model=tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        per_device_eval_batch_size=3,
        save_strategy="no",
        **arguments,
    )
    trainer.compute_loss_func = loss
    return trainer


def sketch_of(trainer):
    return ModelSketch.from_model(trainer.model, 256, "grouped")


def assert_rows_are_own(trainer, rows, sketch):
    """Each is the sketch of the loss that the Trainer computes of its example alone."""
    for row in rows.dataset:
        trainer.train_dataset = DATA.remove_columns("text")
        expected, _ = own(trainer, row["example_id"], sketch)
        got = torch.tensor(row["sketch"])
        assert (got - expected).norm() < 1e-4 * expected.norm()


DATA = tiny_dataset(7)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (None, {}),
        (focal, {}),
        (None, {"label_smoothing_factor": 0.2}),
        # An order of its own, and examples left out, in the Trainer's evaluation.
        (None, {"train_sampling_strategy": "group_by_length"}),
        (None, {"dataloader_drop_last": True}),
    ],
    ids=["own", "function", "smoothing", "by_length", "drop_last"],
)
def test_rows_are_gradients_of_the_trainers_loss(tmp_path, loss, arguments):
    trainer = trainer_of(tmp_path, loss=loss, **arguments)
    sketch = sketch_of(trainer)
    rows = sketch_dataset(trainer=trainer, dataset=DATA, model_sketch=sketch)
    assert rows.dataset["example_id"][:] == [*range(7)]
    assert_rows_are_own(trainer, rows, sketch)


def test_a_loss_that_is_scaled_leaves_rows_as_in_training(tmp_path):
    trainer = trainer_of(tmp_path)
    sketch = sketch_of(trainer)
    plain = sketch_dataset(trainer.model, DATA, sketch).dataset.with_format("torch")[:]
    trainer.__class__ = Doubled
    got = sketch_dataset(trainer=trainer, dataset=DATA, model_sketch=sketch)
    rows = got.dataset.with_format("torch")[:]
    torch.testing.assert_close(rows["sketch"], plain["sketch"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["loss"], plain["loss"])


@pytest.mark.usefixtures("no_generator_use")
def test_the_model_and_its_gradients_are_left_as_they_were(tmp_path):
    trainer = trainer_of(tmp_path)
    parameters = list(trainer.model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    trainer.model.train()
    sketch_dataset(trainer=trainer, dataset=DATA, model_sketch=sketch_of(trainer))
    assert trainer.model.training
    assert bool((parameters[0].grad == 1).all())
    assert all(parameter.grad is None for parameter in parameters[1:])


def test_the_map_is_by_default_that_of_the_run(tmp_path):
    trainer = trainer_of(tmp_path, GradientSketchCallback(64), max_steps=1)
    trainer.train()
    rows = sketch_dataset(trainer=trainer, dataset=DATA)
    store = load_sketches(tmp_path)
    assert rows.model_sketch == store.model_sketch
    assert len(store.attribute(rows, 2)) == 14


def test_what_cannot_be_sketched_is_said(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(TypeError, match=r"brings its model.*not both"):
        sketch_dataset(trainer.model, DATA, trainer=trainer)
    with pytest.raises(TypeError, match=r"brings its model.*not both"):
        sketch_dataset(trainer=trainer, dataset=DATA, batch_size=2)
    with pytest.raises(TypeError, match=r"Pass a model and model_sketch"):
        sketch_dataset(dataset=DATA)
    with pytest.raises(FileNotFoundError):
        sketch_dataset(trainer=trainer, dataset=DATA)

    def twice(outputs, labels, num_items_in_batch=None):
        again = trainer.model(**trainer.data_collator([DATA_ROW])).loss
        return outputs.logits.mean() + again

    trainer.compute_loss_func = twice
    with pytest.raises(ValueError, match="calls the model 2 times per batch"):
        sketch_dataset(trainer=trainer, dataset=DATA, model_sketch=sketch_of(trainer))


DATA_ROW = DATA.remove_columns("text")[0]
