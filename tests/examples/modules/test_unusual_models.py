"""Rows of models whose parameters are not used as their modules promise."""

from collections import UserDict

import pytest
import torch

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.calls import loss_of
from tests.helpers.trained.unusual_models import (
    Bypassed,
    Elsewhere,
    Fused,
    Gated,
    LossAlone,
    Masked,
    Model,
    Noisy,
    Overwritten,
    Repeated,
    Sorted,
    SumOfLosses,
    TiedWithin,
    TimeFirst,
    Within,
    batch,
)


def assert_rows_are_parallel(model, layout="blocked", tolerance=1e-9, inputs=None):
    """Rows are those of single examples, up to a factor where the loss is outside."""
    model = model.double()
    sketch = ModelSketch.from_model(model, 128, layout)
    inputs = inputs or batch()
    with ExampleSketcher(model, sketch) as sketcher:
        loss_of(model(**inputs)).backward()
        got = sketcher.take()
        rules = sketcher.coverage
    whole = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(got.weights @ got.rows, whole, rtol=1e-9, atol=1e-12)
    for index, row in enumerate(got.rows):
        model.zero_grad()
        alone = {name: value[index : index + 1] for name, value in inputs.items()}
        loss_of(model(**alone)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected = sketch.sketch(grads)
        cosine = torch.cosine_similarity(row, expected, dim=0)
        assert cosine > 1 - tolerance, (index, float(cosine))
    model.zero_grad()
    return rules


ELSEWHERE = [Repeated, Elsewhere, Bypassed, Within]
KINDS = [Overwritten, *ELSEWHERE, Sorted, TimeFirst, SumOfLosses, Masked]


@pytest.mark.parametrize("layout", ["blocked", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_single_examples(kind, layout):
    assert_rows_are_parallel(kind(), layout)


def test_hooks_on_gradients_count_also_where_the_first_examples_do_not_show_them():
    inputs = batch()
    inputs["input_ids"][:2] |= 1  # rows of the table that train
    assert_rows_are_parallel(Masked(), inputs=inputs)


def test_what_is_multiplied_by_zero_at_first_is_verified():
    model = Gated().double()
    sketch = ModelSketch.from_model(model, 128)
    with ExampleSketcher(model, sketch) as sketcher:
        for gate in (0.0, 0.5):
            model.gate.data.fill_(gate)
            model.zero_grad()
            loss_of(model(**batch())).backward()
            assert model.gate.item() == gate
            got = sketcher.take()
    for index, row in enumerate(got.rows):
        model.zero_grad()
        alone = {name: value[index : index + 1] for name, value in batch().items()}
        loss_of(model(**alone)).backward()
        expected = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
        assert torch.cosine_similarity(row, expected, dim=0) > 1 - 1e-9


def test_random_numbers_are_those_of_the_batch_also_where_they_do_not_show():
    model = Model().double()
    model.mix = Noisy().double()
    sketch = ModelSketch.from_model(model, 128)
    with ExampleSketcher(model, sketch) as sketcher:
        loss_of(model(**batch())).backward()
        got = sketcher.take()
    whole = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(got.weights @ got.rows, whole, rtol=1e-9, atol=1e-12)


def test_a_loss_alone_is_enough():
    class Mean(LossAlone):
        def loss(self, logits, labels):
            return super().loss(logits, labels.clamp(min=0))

    assert_rows_are_parallel(Mean())


CONFIGS = [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.25}]


@pytest.mark.parametrize("alone", [False, True], ids=["log_probs", "loss"])
@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "softcap", "scale"])
def test_a_head_that_is_never_called_has_a_rule(config, alone):
    model = Fused(config, alone=alone)
    rules = assert_rows_are_parallel(model, "grouped")
    assert not rules.run_again, rules


def test_a_model_may_be_called_with_one_dict():
    class OneDict(Model):
        def forward(self, inputs):
            output = super().forward(**inputs)
            inputs["input_ids"] = inputs["input_ids"] * 0  # its own from now on
            return output

    rows: list[torch.Tensor] = []
    for model, args, kwargs in (
        (OneDict().double(), [UserDict(batch())], {}),
        (Model().double(), [], batch()),
    ):
        sketch = ModelSketch.from_model(model, 128)
        with ExampleSketcher(model, sketch) as sketcher:
            loss_of(model(*args, **kwargs)).backward()
            rows.append(sketcher.take().rows)
    assert torch.equal(*rows)


def test_a_bias_that_a_module_within_holds_too_counts_once():
    assert not assert_rows_are_parallel(TiedWithin()).run_again
