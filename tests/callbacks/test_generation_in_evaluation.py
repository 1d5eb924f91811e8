"""Sequence-to-sequence training that generates in its evaluations."""

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.own_gradients import RESTING, assert_rows_are_own
from tests.helpers.rows import rows_of
from tests.helpers.tiers import full
from tests.helpers.trained.text_training import undropped
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


def trained(directory, model, watched=True, generates=True, **arguments):
    """An evaluation after each step, and how often texts were generated."""
    parts = [tiny_inputs("t5", seed) for seed in range(2)]
    examples = [
        {key: x[index].tolist() for key, x in part.items()}
        for part in parts
        for index in range(4)
    ]
    settings = {
        **RESTING,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "predict_with_generate": generates,
        "generation_max_length": 5,
    }
    generated = []
    plain = model.generate

    def generate(*args, **kwargs):
        generated.append(len(model._forward_hooks))
        return plain(*args, **kwargs)

    model.generate = generate
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=examples,
        eval_dataset=examples[:4],
        compute_metrics=lambda _: {},  # without it, nothing is generated
        callbacks=[GradientSketchCallback(64)] if watched else [],
    )
    trainer.train()
    del model.generate
    assert len(generated) == 3 * generates
    assert not any(generated)  # no hook is on the model
    return trainer


@pytest.mark.parametrize("name", ["t5", *full("bart")])
def test_rows_are_those_of_their_examples(tmp_path, name):
    trainer = trained(tmp_path, undropped(name), learning_rate=0.0)
    assert_rows_are_own(trainer)


def test_neither_rows_nor_training_change(tmp_path):
    def dropped():
        return tiny_model("t5", torch.float32)

    rows = trained(tmp_path / "rows", dropped())
    plain = trained(tmp_path / "plain", dropped(), watched=False)
    trained(tmp_path / "no texts", dropped(), generates=False)
    weights = zip(rows.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)
    assert rows_of(tmp_path / "rows") == rows_of(tmp_path / "no texts")
    assert len(load_sketches(tmp_path / "rows").dataset) == 8
