"""What cannot be guarded is refused before a step is made."""

import warnings

import pytest
import torch

from hf_sketch.callbacks import GradientSketchCallback, GuardCallback
from tests.helpers.trained.guarded_training import (
    STEPS,
    guard_of,
    guarded_trainer,
    recorder,
)


def fails(directory, match, *callbacks, **arguments):
    trainer = guarded_trainer(directory, *callbacks, **arguments)
    with pytest.raises(ValueError, match=match):
        trainer.train()


def test_what_cannot_be_guarded_is_refused(tmp_path):
    fails(tmp_path, "has no GradientSketchCallback", guard_of())
    fails(tmp_path, "List it after", guard_of(), recorder())
    steps_only = GradientSketchCallback(48, per_example=False)
    fails(tmp_path, "Pass per_example=True", steps_only, guard_of())
    fails(tmp_path, "no examples", recorder(), GuardCallback([]))
    floats = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"))
    floats.data_collator = lambda rows: {
        "x": torch.tensor([row["x"] for row in rows]),
        "labels": torch.eye(2)[[row["labels"] for row in rows]],
    }
    with pytest.raises(ValueError, match="no integer labels"):
        floats.train()


def test_losses_outside_the_model_need_a_guard_set(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = guarded_trainer(tmp_path, recorder(), GuardCallback())
    trainer.compute_loss_func = loss
    with (
        pytest.warns(UserWarning, match="computed outside the model"),
        pytest.raises(ValueError, match="Pass queries to GuardCallback"),
    ):
        trainer.train()


@pytest.mark.parametrize("size", [1, 8])
def test_a_loss_that_counts_labels_of_minus_100_has_no_quarantine(tmp_path, size):
    options = {"per_device_eval_batch_size": size}
    trainer = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"), **options)

    def forward(x, labels):
        logits = trainer.model.layers(x)
        own = logits.logsumexp(1) - logits.gather(1, labels.clamp(0)[:, None])[:, 0]
        return {"loss": own.mean(), "logits": logits}

    trainer.model.forward = forward
    trainer.args.measure_error = False
    with pytest.raises(ValueError, match="counts such examples"):
        trainer.train()


def collated(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_labels_of_whole_batches_have_no_quarantine(tmp_path):
    trainer = guarded_trainer(tmp_path, recorder(), guard_of("quarantine"))

    def flat(rows):
        batch = collated(rows)
        return {**batch, "labels": batch["labels"][None]}

    trainer.data_collator = flat
    with pytest.raises(ValueError, match=r"a batch of 2 has labels of shape \(1, 2\)"):
        trainer.train()


def test_examples_in_another_order_have_no_quarantine(tmp_path):
    def train(action):
        trainer = guarded_trainer(tmp_path / action, recorder(), guard_of(action))
        trainer.model.main_input_name = "x"
        trainer.data_collator = lambda rows: collated(
            sorted(rows, key=lambda row: row["x"][1])
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Step .* stands out", UserWarning)
            trainer.train()
        return trainer

    with pytest.raises(ValueError, match="in the order in which the sampler drew them"):
        train("quarantine")
    assert train("skip").state.global_step == STEPS


@pytest.mark.parametrize(
    ("setting", "value"),
    [("every", 0), ("action", "stop"), ("threshold", -1.0), ("window", 9)],
)
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        guard_of(**{setting: value})
