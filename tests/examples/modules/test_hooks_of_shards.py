"""Hooks that gather, split and reduce parameters, as DeepSpeed's in ZeRO-3."""

from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.modules import hooks, reading
from hf_sketch.model.fsdp import call_with, gathered_within
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


def rows_of(name, change=lambda model: model, shards=True, **settings):
    """The rows of a batch, with parameters that are taken to be in shards."""
    model, inputs = change(tiny_model(name, **settings)), tiny_inputs(name)
    sketch, names = ModelSketch.from_model(model, 64, "grouped"), names_of(model)
    with (
        patch.object(reading, "in_shards", return_value=shards),
        ExampleSketcher(model, sketch) as sketcher,
    ):
        model(**inputs).loss.backward()
        rows = sketcher.take().rows
    assert names_of(model) == names
    return rows


def names_of(model):
    return [
        {name for name, _ in f()} for f in (model.named_parameters, model.named_buffers)
    ]


def assert_rows_stay(name, change, reference=lambda model: model):
    rows, wanted = rows_of(name, change), rows_of(name, reference, shards=False)
    torch.testing.assert_close(rows, wanted, rtol=1e-9, atol=1e-12)


def replace_outputs_by_aliases(model):
    """Replace each output, as the pre-backward hooks of ZeRO-3 do."""

    def alias(x):
        return x.view_as(x) if isinstance(x, torch.Tensor) else x

    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: tree_map(alias, output))
    return model


def test_position_biases_are_found_again_if_they_are_aliases():
    assert_rows_stay("t5", replace_outputs_by_aliases)


def with_adapters(model):
    """Put LoRA on the experts, too: PEFT parametrizes their weights in each call."""
    torch.manual_seed(1)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    adapter = LoraConfig(
        r=2, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    return get_peft_model(model, adapter)


def test_experts_with_adapters_are_run_again_with_their_copies():
    assert_rows_stay("mixtral", with_adapters, with_adapters)


def count_calls(block, calls, owner):
    """Register a hook on the block's backward pass as a package would."""

    def reduce(module, input_gradients, output_gradients):
        calls.append(module)

    reduce.__module__ = owner
    block.register_full_backward_hook(reduce)


def test_gradients_of_experts_are_reduced_in_their_backward_pass_alone():
    calls, blocks = [], []

    def add_hooks(model):
        blocks.extend(layer.mlp for layer in model.model.layers)
        for block in blocks:
            count_calls(block, calls, "deepspeed.runtime.zero.stage3")
        return model

    assert_rows_stay("mixtral", add_hooks)
    assert sorted(map(id, calls)) == sorted(map(id, blocks))


def test_a_process_without_memory_gathers_as_the_others_do():
    """The others would wait for it."""
    gathered, watch = [], hooks._watch

    def note(module):
        gathered.append(type(module).__name__)
        return gathered_within(module)

    def fail(rule, batch, *call):
        if batch.blamed is None:  # no trial
            raise torch.OutOfMemoryError("the device is full")
        return watch(rule, batch, *call)

    with patch.object(hooks, "gathered_within", note):
        rows_of("vit")
        wanted = gathered.copy()
        gathered.clear()
        with (
            patch.object(hooks, "_watch", fail),
            pytest.raises(MemoryError, match="the device is full"),
        ):
            rows_of("vit")
    assert gathered == wanted != []


def test_a_balancing_loss_is_refused():
    with pytest.raises(ValueError, match="output_router_logits = False"):
        rows_of("mixtral", output_router_logits=True)


def test_a_call_past_shards_keeps_other_hooks_and_their_order():
    module, calls = torch.nn.Linear(2, 2), []

    def hook(owner):
        def note(*_):
            calls.append(owner)

        note.__module__ = owner
        return note

    owners = ["deepspeed.runtime", "mine", "torch.distributed.fsdp", "yours"]
    for owner in owners:
        module.register_forward_pre_hook(hook(owner))
    parameters = dict(module.named_parameters())
    call_with(module, parameters, (torch.ones(1, 2),), {})
    assert calls == ["mine", "yours"]
    calls.clear()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_with(module, parameters, (torch.ones(1, 3),), {})
    calls.clear()
    module(torch.ones(1, 2))
    assert calls == owners
