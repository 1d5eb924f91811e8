"""Losses of an unknown form, whose examples show how they add up."""

import pytest
import torch

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from tests.helpers.trained.fused_models import (
    IDS,
    LossOfRows,
    LossOfTokens,
    fused_llama,
)

SIZE = 256


def made_alone(model, sketch, labels, index):
    """The sketched gradient of an example's own mean loss."""
    model.zero_grad()
    some = slice(index, index + 1)
    model(input_ids=IDS[some], labels=labels[some]).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return sketch.sketch({name: p.grad for name, p in trained.items()})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("kind", [LossOfTokens, LossOfRows])
def test_a_loss_alone_shows_what_it_is_a_mean_of(rows, items, kind):
    model = fused_llama(kind=kind)
    model.lm_head.requires_grad_(False)  # its own rule takes no other loss
    sketch = ModelSketch.from_model(model, SIZE)
    labels = IDS[:rows].clone()
    labels[0, :4] = -100
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    with ExampleSketcher(model, sketch) as sketcher:
        model(input_ids=IDS[:rows], labels=labels, **given).loss.backward()
        batch = sketcher.take()
    divisor = 1.0
    if kind is LossOfTokens:
        counts = (labels[:, 1:] != -100).sum(1).double()
        weights = counts / (counts.sum() if items is None else items)
    elif items is None:
        weights = torch.full((rows,), 1 / rows, dtype=torch.float64)
    else:  # a sum, and who knows of what the items are the number
        weights, divisor = torch.ones(rows, dtype=torch.float64), items
    torch.testing.assert_close(batch.weights, weights)
    for index in range(rows):
        row = made_alone(model, sketch, labels, index) / divisor
        # The model computes parts in float32.
        assert (batch.rows[index] - row).norm() < 2e-6 * row.norm()


@pytest.mark.parametrize("kind", [LossOfTokens, LossOfRows])
@pytest.mark.parametrize("even", [False, True], ids=["uneven", "even"])
def test_forms_are_found_in_16_bits(kind, even):
    """Not by examples with equally many tokens: their rows are shares, for good."""
    model = fused_llama(kind=kind).float()
    model.lm_head.requires_grad_(False)
    sketch = ModelSketch.from_model(model, SIZE)
    labels = IDS.clone()
    labels[2, :7] = -100
    counts = torch.tensor([11.0, 11.0, 5.0])
    with ExampleSketcher(model, sketch) as sketcher:
        for some in (IDS, labels) if even else (labels,):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=IDS, labels=some).loss
            loss.backward()
            batch = sketcher.take()
    is_token_mean = kind is LossOfTokens and not even
    weights = counts / counts.sum() if is_token_mean else torch.full((3,), 1 / 3)
    torch.testing.assert_close(batch.weights, weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("items", [None, 40])
def test_forms_are_found_on_a_device(items):
    """There, tokens are counted, while gradients are compared on the CPU."""
    model = fused_llama(kind=LossOfTokens).float().cuda()
    model.lm_head.requires_grad_(False)
    sketch = ModelSketch.from_model(model, SIZE)
    ids, labels = IDS.cuda(), IDS.cuda()
    labels[2, :7] = -100
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items).cuda()}
    with ExampleSketcher(model, sketch) as sketcher:
        model(input_ids=ids, labels=labels, **given).loss.backward()
        batch = sketcher.take()
    counts = torch.tensor([11.0, 11.0, 5.0])
    weights = counts / (counts.sum() if items is None else items)
    torch.testing.assert_close(batch.weights.cpu(), weights)
