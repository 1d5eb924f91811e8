"""Sums of outer products are sketched without being formed, in memory they share."""

import pytest
import torch

from hf_sketch import QK, Grouped
from hf_sketch.sketches import grouped
from hf_sketch.sketches.outer import Routed, Side
from hf_sketch.sketches.pieces import WorkingMemory
from tests.helpers.operators.dense import dense_grouped, dense_qk


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator())


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_outer_products_of_experts_are_sketched_as_if_they_were_formed():
    operator = Grouped(480, 60, 2, sides=(4, 5, 24), widths=(8, 16))
    left, right = random(12, 5), random(12, 24)
    example = torch.tensor([0, 2, 2, 0, 0, 2, 2, 2, 0, 2, 0, 2])  # and none of 1
    expert = torch.tensor([3, 1, 1, 0, 3, 2, 2, 1, 0, 3, 3, 1])
    formed = torch.zeros(3, 4, 5, 24, dtype=torch.float64)
    for t in range(12):
        formed[example[t], expert[t]] += torch.outer(left[t], right[t])
    routed = Routed(right, example, expert, 3, 4)
    left, right, expert = routed.by_example(left)
    rows = torch.ones(3, 60, dtype=torch.float64)
    sides = Side(left, expert=expert), Side(right, expert=expert)
    operator.add_outer_(rows, *sides, WorkingMemory())
    assert_close(rows, 1 + formed.flatten(1) @ dense_grouped(operator).T)


@pytest.mark.parametrize(
    "operator",
    [
        Grouped(360, 64, 3, sides=(60, 6), widths=(32, 8), stream="w"),
        Grouped(114, 60, 1, sides=(19, 6), widths=(16, 16)),
        QK(60, 16, 0, in_factors=(10, 6), out_factors=(4, 4), rotation="signs"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("at_once", [1, 2**17])
def test_sums_of_outer_products_share_memory(operator, scaled, at_once, monkeypatch):
    monkeypatch.setattr(grouped, "_ELEMENTS_AT_ONCE", at_once)
    height, width = operator.sides
    dense = dense_grouped(operator) if isinstance(operator, Grouped) else None
    matrix = dense_qk(operator, (10, 6), (4, 4)) if dense is None else dense
    scales = (random(height), random(width)) if scaled else (None, None)
    factors = torch.outer(*scales) if scaled else torch.ones(height, width).double()
    left, right = random(5, 7, height), random(5, 7, width)
    ids = torch.arange(35).view(5, 7) * 11 % height
    one_hot = torch.nn.functional.one_hot(ids, height).double()
    rows, memory = torch.ones(5, operator.out_size).double(), WorkingMemory()
    whole = Side(right, scale=scales[1])
    operator.add_outer_(rows, Side(left, scale=scales[0]), whole, memory)
    operator.add_outer_(rows, Side(ids, scale=scales[0]), whole, memory)
    given = random(5, 7, height)
    folded = Side(operator.fold(given, 0), folded=True)
    operator.add_outer_(rows, folded, Side(right), memory)
    formed = torch.einsum("bti,btj->bij", left + one_hot, right) * factors
    formed += torch.einsum("bti,btj->bij", given, right)
    assert_close(rows, 1 + formed.flatten(1) @ matrix.T)
