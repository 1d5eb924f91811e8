import copy
import json
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sketch import SubspaceConfig
from tests.helpers.adapters import adapted, moved_copy
from tests.helpers.trained.tiny_models import (
    NAMES,
    DoublePrecision,
    tiny_inputs,
    tiny_model,
)


def full_gradient(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_sketch_of_the_full_gradient(name):
    with DoublePrecision():
        base, batch = tiny_model(name), tiny_inputs(name)
        plain = copy.deepcopy(base)
        model, tuner = adapted(base, max_dim=64)
        model(**batch).loss.backward()
        gradient = full_gradient(moved_copy(plain, tuner), batch)
        expected = tuner.model_sketch.sketch(gradient)[:16]
    torch.testing.assert_close(tuner.omega.grad, expected, rtol=1e-9, atol=1e-12)
    assert [p for p in model.parameters() if p.requires_grad] == [tuner.omega]


@pytest.mark.parametrize("layout", ["grouped", "blocked", "factored", "flat"])
@pytest.mark.parametrize("operator", ["affd", "afjl", "qk", "ffd", "srht", "dense"])
def test_gradients_are_slopes_of_the_loss(operator, layout):
    batch = tiny_inputs("gpt2")
    with DoublePrecision():
        settings = {"operator": operator, "layout": layout, "seed": 2}
        model, tuner = adapted(tiny_model("gpt2"), 64, **settings)
        (gradient,) = torch.autograd.grad(model(**batch).loss, tuner.omega)
        start = tuner.omega.detach().clone()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(3, 64, generator=generator, dtype=torch.float64)
        for direction in directions:
            losses = []
            for step in (1e-6, -1e-6):
                tuner.replace_omega("default", start + step * direction)
                losses.append(model(**batch).loss.detach())
            slope = (losses[0] - losses[1]) / 2e-6
            torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=0)


def test_two_micro_batches_add_up():
    batch = tiny_inputs("gpt2")
    model, tuner = adapted(tiny_model("gpt2"))
    for part in (slice(0, 2), slice(2, 4)):
        model(**{name: tensor[part] for name, tensor in batch.items()}).loss.backward()
    both = tuner.omega.grad.clone()
    tuner.omega.grad = None
    sums = []
    for part in (slice(0, 2), slice(2, 4)):
        output = model(**{name: tensor[part] for name, tensor in batch.items()})
        sums.append(output.loss)
    sum(sums).backward()
    torch.testing.assert_close(tuner.omega.grad, both)


def test_activation_checkpointing_gives_the_same_gradient():
    batch = tiny_inputs("llama")
    model, tuner = adapted(tiny_model("llama"))
    model(**batch).loss.backward()
    expected, tuner.omega.grad = tuner.omega.grad, None
    inner = model.train().get_base_model()  # in evaluation nothing is checkpointed
    inner.config.use_cache = False
    inner.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    torch.testing.assert_close(tuner.omega.grad, expected)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    inner.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant=True.*'use_reentrant': False"):
        model(**batch)


def test_weights_that_moved_before_the_backward_pass_are_noticed():
    batch = tiny_inputs("gpt2")
    model, tuner = adapted(tiny_model("gpt2"))
    loss = model(**batch).loss
    with torch.no_grad():
        tuner.omega.add_(0.1)
        model(**batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_keeps_the_map_in_float32():
    batch = tiny_inputs("bert")
    base = tiny_model("bert", torch.float32)
    plain = copy.deepcopy(base)
    model, tuner = adapted(base)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    reference = moved_copy(plain, tuner)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference(**batch).loss
    loss.backward()
    gradient = {n: p.grad for n, p in reference.named_parameters()}
    gradient = {n: g for n, g in gradient.items() if g is not None}
    expected = tuner.model_sketch.sketch(gradient)
    torch.testing.assert_close(tuner.omega.grad, expected, rtol=0.05, atol=1e-3)


def test_weights_in_bfloat16_have_a_float32_omega():
    batch = tiny_inputs("llama")
    model, tuner = adapted(tiny_model("llama", torch.bfloat16))
    model(**batch).loss.backward()
    assert tuner.omega.dtype == torch.float32
    assert tuner.omega.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, ("srht", "grouped")),
        ({"max_dim": 2**13}, ("srht", "grouped")),
        ({"max_dim": 2**14}, ("affd", "blocked")),
        ({"operator": "afjl"}, ("afjl", "blocked")),
        ({"operator": "qk", "layout": "flat"}, ("qk", "flat")),
        ({"layout": "blocked"}, ("srht", "blocked")),
    ],
)
def test_an_operator_and_a_layout_are_chosen_and_saved(settings, chosen, tmp_path):
    config = SubspaceConfig(**settings)
    assert (config.operator, config.layout) == chosen
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["operator"], saved["layout"]) == chosen


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"dim": 16.5}, "dim must be an integer of at least 1, got 16.5"),
        ({"dim": 8, "max_dim": "64"}, "max_dim must be an integer .*, got '64'"),
        ({"dim": 8, "seed": []}, r"seed must be an integer .*, got \[\]"),
        ({"dim": 8, "base_on_disk": 1}, "base_on_disk must be True or False, got 1"),
        ({"dim": 8, "max_dim": 4}, "max_dim=4.*got 8"),
        ({"dim": 10**6}, r"at most \d+, the number of parameters, got 1000000"),
        ({"operator": "fft"}, "operator must be one of"),
        ({"layout": "round"}, "layout must be one of"),
        ({"target_parameters": ["nothing"]}, "needs parameters, got none"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(
            tiny_model("vit", torch.float32), SubspaceConfig(**{"dim": 16, **settings})
        )


def test_operators_that_do_not_fit_a_parameter_are_refused():
    config = SubspaceConfig(dim=1000, operator="qk")
    with pytest.raises(ValueError, match=r"got 1000: .* Or pass layout='flat'"):
        get_peft_model(nn.Linear(300, 300), config)
    config = SubspaceConfig(dim=1000, operator="qk", layout="flat")
    assert len(get_peft_model(nn.Linear(300, 300), config).base_model.omega) == 1000


def test_quantized_models_are_refused():
    model = tiny_model("gpt2", torch.float32)
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"quantized model.*quantization_config"):
        get_peft_model(model, SubspaceConfig(dim=8))


def test_recurrent_layers_are_refused():
    model = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="LSTM at 0, which keeps a list"):
        get_peft_model(model, SubspaceConfig(dim=8))


def test_parameters_that_were_exchanged_are_an_error():
    """As FSDP does; the adapter would move what the model no longer holds."""
    model, _ = adapted(tiny_model("gpt2", torch.float32))
    layer = model.get_submodule("base_model.model.transformer.ln_f")
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(ValueError, match=r"in the places of 1, transformer\.ln_f\.wei"):
        model(**tiny_inputs("gpt2"))


def test_old_versions_of_peft_are_refused(monkeypatch):
    monkeypatch.setattr("hf_sketch.subspace.config.version", lambda _: "0.20.0")
    with pytest.raises(ImportError, match=r"peft>=0\.21, got 0\.20\.0: pip install"):
        SubspaceConfig(dim=8)


def test_copies_and_pickles_have_an_omega_of_their_own():
    batch = tiny_inputs("gpt2")
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    with torch.inference_mode():
        logits = model(**batch).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**batch).logits, logits)
        with torch.no_grad():
            copied.base_model.omega.mul_(2)
        copied(**batch).loss.backward()
        assert copied.base_model.omega.grad.any()
        assert not torch.equal(copied(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)
    assert tuner.omega.grad is None


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_models_have_the_same_gradient():
    batch = tiny_inputs("gpt2")
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    model(**batch).loss.backward()
    expected, tuner.omega.grad = tuner.omega.grad, None
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    torch.testing.assert_close(tuner.omega.grad, expected)
    with torch.no_grad():
        tuner.omega.mul_(2)
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
