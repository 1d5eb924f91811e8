"""Rows in the geometry of Adam: of gradients divided by roots of second moments."""

import pytest
import torch

from hf_sketch import load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.model.sketch import ModelSketch
from tests.helpers.rows import rows_of
from tests.helpers.trained.training import Interrupt, tiny_bert, tiny_trainer

SIZE = 64
EPS = 1e-8  # AdamW's default
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def callback():
    return GradientSketchCallback(SIZE, normalize="adam")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A Trainer that has resumed at step 2, with its rows."""
    directory = tmp_path_factory.mktemp("resumed")
    tiny_trainer(directory, model=tiny_bert(**CALM)).train()
    trainer = tiny_trainer(directory, callback(), model=tiny_bert(**CALM))
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    return trainer, directory


def moments_of(directory, model, step):
    """Second moments at a checkpoint, by name of the parameter."""
    saved = torch.load(directory / f"checkpoint-{step}" / "optimizer.pt")
    trainer = tiny_trainer(directory / "unused", model=model)
    trainer.create_optimizer()
    trainer.optimizer.load_state_dict(saved)
    return {
        name: trainer.optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**step)
        for name, p in model.named_parameters()
    }


def divided(gradient, moment):
    if moment.dim() == 2:
        moment = moment.mean(1, keepdim=True) * moment.mean(0) / moment.mean()
    return (gradient / (moment + EPS**2).sqrt()).where(moment > 0, 0)


def test_the_first_rows_after_resuming_are_divided_by_the_checkpoints_moments(resumed):
    trainer, directory = resumed
    store = load_sketches(directory)
    rows = store.where(step=3).dataset.with_format("torch")[:]
    start = directory / "checkpoint-2"
    model = type(trainer.model).from_pretrained(start, **CALM)
    plain = ModelSketch.from_model(model, SIZE, "grouped", seed=7)
    moments, later = (moments_of(directory, model, step) for step in (2, 6))
    assert len(rows["step"]) == 6
    for index, sketch in zip(rows["example_id"], rows["sketch"], strict=True):
        example = trainer.data_collator([trainer.train_dataset[int(index)]])
        example.pop("text", None)
        model.zero_grad()
        model(**example).loss.backward()
        expected = plain.sketch(
            {n: divided(p.grad, moments[n]) for n, p in model.named_parameters()}
        )
        # The gradients of keys' biases are rounding errors, here a part of the row.
        assert (sketch - expected).norm() < 0.05 * expected.norm()
        late = plain.sketch(
            {n: divided(p.grad, later[n]) for n, p in model.named_parameters()}
        )
        assert (sketch - late).norm() > 0.2 * expected.norm()


def test_queries_are_divided_too(resumed):
    trainer, directory = resumed
    store = load_sketches(directory)
    data = trainer.train_dataset.select(range(3)).remove_columns("text")
    queries = sketch_dataset(trainer.model, data, store.model_sketch)
    assert len(store.attribute(queries, top_k=2)) == 6
    plain = ModelSketch.from_model(trainer.model, SIZE, "grouped", seed=7)
    with pytest.raises(ValueError, match="map"):
        store.attribute(sketch_dataset(trainer.model, data, plain), top_k=2)


def test_an_interrupted_run_keeps_the_moments_that_it_began_with(resumed, tmp_path):
    _, directory = resumed
    tiny_trainer(tmp_path, model=tiny_bert(**CALM)).train()
    first = tmp_path / "checkpoint-2"
    trainer = tiny_trainer(tmp_path, callback(), Interrupt(5), model=tiny_bert(**CALM))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(first))
    trainer = tiny_trainer(tmp_path, callback(), model=tiny_bert(**CALM))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rows_of(tmp_path) == rows_of(directory)


def test_training_from_the_start_is_refused(tmp_path):
    message = r"second moments of '.*', and AdamW has none. Train some steps"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, callback()).train()


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(ValueError, match="normalize must be one of 'adam', got 'lion'"):
        GradientSketchCallback(normalize="lion")
