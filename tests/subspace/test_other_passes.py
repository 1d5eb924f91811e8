"""Forward passes, saving and loading between a forward and its backward pass."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sketch import SubspaceConfig
from hf_sketch.subspace.weights import MovedWeights
from tests.helpers.adapters import adapted
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model
from tests.helpers.trained.trl_training import (
    needs_trl,
    pairs,
    tiny_llama,
    trl_trainer,
)

BATCH = tiny_inputs("llama")


def disabled(model):
    """As for the reference of preference training."""
    with torch.no_grad(), model.disable_adapter():
        model(**BATCH)
    return 0


def of_another_adapter(model):
    """As for a frozen copy of the adapter that training began with."""
    model.set_adapter("other")
    with torch.no_grad():
        model(**BATCH)
    model.set_adapter("default")
    return 0


def without_gradients(model):
    with torch.no_grad():
        model(**BATCH)
    return 0


def in_inference_mode(model):
    with torch.inference_mode():
        model(**BATCH)
    return 0


def of_the_same_loss(model):
    return model(**BATCH).loss


OTHER_PASSES = [
    disabled,
    of_another_adapter,
    without_gradients,
    in_inference_mode,
    of_the_same_loss,
]


def two_adapters(checkpointing, **settings):
    model, tuner = adapted(tiny_model("llama"), **settings)
    config = SubspaceConfig(dim=16, seed=4, init_weights=False, **settings)
    model.add_adapter("other", config)
    inner = model.train().get_base_model()  # in evaluation nothing is checkpointed
    inner.config.use_cache = False
    if checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    return model, tuner


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("other_pass", OTHER_PASSES)
def test_other_passes_may_come_before_the_backward_pass(other_pass, checkpointing):
    model, tuner = two_adapters(False)
    model(**BATCH).loss.backward()
    times = 2 if other_pass is of_the_same_loss else 1
    expected = times * tuner.omega.grad
    model, tuner = two_adapters(checkpointing)
    for _ in range(2):
        tuner.omega.grad = None
        loss = model(**BATCH).loss
        (loss + other_pass(model)).backward()
        torch.testing.assert_close(tuner.omega.grad, expected)
    del loss
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("other_pass", [disabled, of_another_adapter])
def test_with_theta0_on_disk_other_weights_are_refused(other_pass, checkpointing):
    model, _ = two_adapters(checkpointing, base_on_disk=True)
    loss = model(**BATCH).loss
    message = "base_on_disk=False" if checkpointing else "modified by an inplace"
    with pytest.raises(RuntimeError, match=message):
        (loss + other_pass(model)).backward()


def test_a_loss_without_a_backward_pass_leaves_theta0():
    base = tiny_model("llama")
    expected = copy.deepcopy(base.state_dict())
    model, _ = adapted(base)
    base.config.use_cache = False
    base.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(**BATCH).loss
    assert not all(isinstance(p, nn.Parameter) for p in base.parameters())
    del loss
    assert all(isinstance(p, nn.Parameter) for p in base.parameters())
    torch.testing.assert_close(base.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pass_that_fails_is_forgotten(on_disk):
    model, tuner = two_adapters(True, base_on_disk=on_disk)
    expected = copy.deepcopy(model.state_dict())
    wrong = {**BATCH, "input_ids": BATCH["input_ids"] + 10**6}
    with pytest.raises(IndexError) as kept:
        model(**wrong)
    assert kept.traceback  # which holds on to the pass
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    model(**BATCH).loss.backward()
    assert bool(tuner.omega.grad.any())


def test_theta_is_computed_again_where_memory_has_run_out(monkeypatch):
    model, tuner = adapted(tiny_model("llama"))
    expected = model(**BATCH).logits
    tuner._theta.restore()

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(MovedWeights, "move", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(**BATCH)
    assert torch.equal(model(**BATCH).logits, expected)


@pytest.mark.parametrize("on_disk", [False, True])
def test_saved_weights_are_theta0_also_after_a_forward_pass(on_disk):
    base = tiny_model("llama")
    expected = copy.deepcopy(base.state_dict())
    model, _ = adapted(base, base_on_disk=on_disk)
    logits = model(**BATCH).logits
    torch.testing.assert_close(base.state_dict(), expected, rtol=0, atol=0)
    assert torch.equal(model(**BATCH).logits, logits)
    inner = {name.removeprefix("model."): x for name, x in expected.items()}
    del inner["lm_head.weight"]
    torch.testing.assert_close(base.model.state_dict(), inner, rtol=0, atol=0)
    model(**BATCH)
    model.to("cpu")
    torch.testing.assert_close(base.state_dict(), expected, rtol=0, atol=0)
    model.merge_adapter()
    merged = base.state_dict()
    assert not torch.equal(merged["lm_head.weight"], expected["lm_head.weight"])
    model.unmerge_adapter()
    torch.testing.assert_close(base.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_loaded_weights_replace_theta0_also_after_a_forward_pass(on_disk, disabled):
    model, tuner = adapted(tiny_model("llama"), base_on_disk=on_disk)
    model(**BATCH)
    torch.manual_seed(9)
    other = {n: p + 0.01 * torch.randn_like(p) for n, p in model.state_dict().items()}
    with model.disable_adapter() if disabled else nullcontext():
        model.load_state_dict(other)
    fresh, _ = adapted(tiny_model("llama"), base_on_disk=on_disk)
    fresh.load_state_dict(other)
    expected = fresh(**BATCH).logits
    assert torch.equal(model(**BATCH).logits, expected)
    with torch.no_grad():
        tuner.omega.mul_(2)
        model(**BATCH)
        tuner.omega.div_(2)
    assert torch.equal(model(**BATCH).logits, expected)


@needs_trl
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("again", [False, True], ids=["new", "trained"])
def test_preferences_are_learned_as_without_activation_checkpointing(tmp_path, again):
    """TRL's reference is the base model, or a copy of an adapter that has trained."""

    def losses(checkpointing):
        config, model = SubspaceConfig(dim=16, seed=2), tiny_llama()
        if again:
            model = get_peft_model(model, config)
            torch.nn.init.normal_(model.base_model.omega, std=0.1)
        trainer = trl_trainer(
            tmp_path / str(checkpointing),
            "DPO",
            pairs(),
            model=model,
            more={} if again else {"peft_config": config},
            gradient_checkpointing=checkpointing,
            learning_rate=0.05,
            max_steps=3,
            logging_strategy="steps",
            logging_steps=1,
        )
        torch.manual_seed(0)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    first, *later = found = losses(checkpointing=False)
    assert first == pytest.approx(math.log(2), abs=1e-5)  # the reference's own loss
    assert all(abs(loss - first) > 1e-3 for loss in later)
    assert losses(checkpointing=True) == pytest.approx(found, abs=1e-6)
