"""Hooks that gather, split and reduce parameters, as DeepSpeed's in ZeRO-3."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_map

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.modules import hooks, reading
from hf_sketch.model.fsdp import call_with, gathered_within
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def in_shards():
    with patch.object(reading, "in_shards", return_value=True):
        yield


def rows_of(name, change=lambda model: None, **settings):
    model, inputs = tiny_model(name, **settings), tiny_inputs(name)
    change(model)
    sketch = ModelSketch.from_model(model, 64, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        return sketcher.take().rows


def give_outputs_another_place(model):
    """Put an alias in the place of each output, as the pre-backward hooks do."""

    def alias(x):
        return x.view_as(x) if isinstance(x, torch.Tensor) else x

    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: tree_map(alias, output))


def test_position_biases_are_found_again_in_another_place():
    rows = rows_of("t5", give_outputs_another_place)
    torch.testing.assert_close(rows, rows_of("t5"), rtol=1e-9, atol=1e-12)


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

    rows = rows_of("mixtral", add_hooks)
    assert sorted(map(id, calls)) == sorted(map(id, blocks))
    torch.testing.assert_close(rows, rows_of("mixtral"), rtol=1e-9, atol=1e-12)


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
