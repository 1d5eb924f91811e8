"""LoRA begins with a factor that is zero, so that the other has no gradient yet."""

import json
from unittest.mock import patch

import peft
import pytest

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.modules import reading
from tests.helpers.rows import assert_same_rows
from tests.helpers.trained.training import tiny_bert, tiny_trainer
from tests.helpers.wrong_rules import wrong_first_factors

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ONE_BATCH = {"gradient_accumulation_steps": 1, "num_train_epochs": 1}


def trained(directory, **arguments):
    """The store of a training, and why its rules were not verified, if so."""
    adapter = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(tiny_bert(**STILL), adapter)
    callback = GradientSketchCallback(64)
    tiny_trainer(directory, callback, model=model, **ONE_BATCH, **arguments).train()
    header = json.loads((directory / "sketches" / "header.json").read_text())
    return load_sketches(directory), header["unverified"]


def as_in_shards():
    """Rules are tried as where zeros cannot be replaced for it."""
    return patch.object(reading, "in_shards", return_value=True)


def test_rules_are_tried_again_when_gradients_are_zero_no_longer(tmp_path):
    """The weights stay as they are in the first step, and move in the next."""
    settings = {"warmup_steps": 2, "learning_rate": 1e-2}
    wanted, _ = trained(tmp_path / "whole", **settings)
    with as_in_shards(), wrong_first_factors():
        got, unverified = trained(tmp_path / "shards", **settings)
    assert_same_rows(got, wanted)
    assert unverified is None


def test_rows_whose_gradients_stay_zero_are_marked_after_some_trials(tmp_path):
    warned = "lora_A.default.weight were zero in 4 trials"
    with as_in_shards(), pytest.warns(UserWarning, match=warned):
        _, unverified = trained(tmp_path, learning_rate=0.0)
    assert warned in unverified
