"""Sketching beside a backward pass: training stays as it was, and nothing is held."""

import gc
import weakref

import pytest
import torch

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.trained.training import tiny_batch, tiny_bert


def test_the_backward_pass_is_bit_equal_with_and_without():
    gradients = []
    for watched in (False, True):
        model = tiny_bert().train()
        sketcher = ExampleSketcher(model, ModelSketch.from_model(model, 256))
        torch.manual_seed(5)
        if watched:
            with sketcher:
                model(**tiny_batch()).loss.backward()
        else:
            model(**tiny_batch()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sketching_holds_nothing_of_the_batch_afterwards():
    model, made = tiny_bert().eval(), []
    linear = model.classifier
    linear.register_forward_hook(lambda *call: made.append(weakref.ref(call[2])))
    gc.collect()
    gc.disable()
    try:
        with ExampleSketcher(model, ModelSketch.from_model(model, 64)) as sketcher:
            sketcher.sketch(tiny_batch())
            assert made
            assert all(output() is None for output in made)
    finally:
        gc.enable()


def test_sketching_leaves_gradients_and_hooks_as_they_were():
    model = tiny_bert().eval()
    with ExampleSketcher(model, ModelSketch.from_model(model, 256)) as sketcher:
        sketcher.sketch(tiny_batch())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_taking_without_a_backward_pass_is_named():
    model = tiny_bert()
    with ExampleSketcher(model, ModelSketch.from_model(model, 256)) as sketcher:
        model(**tiny_batch())
        with pytest.raises(RuntimeError, match="a forward and a backward pass"):
            sketcher.take()
    with pytest.raises(RuntimeError, match="inside `with ExampleSketcher"):
        sketcher.sketch(tiny_batch())
