"""Numbers are drawn where they are used."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sketch import AFFD, AFJL, FFD, SRHT
from hf_sketch.sketches.transforms.random import (
    CounterRandom,
    ascending_order,
    drawing,
)

ELSEWHERE = torch.device("meta")  # where tensors have shapes alone
MOST = 2**12  # numbers of factors of transforms, which are few


class OnTheCpu(TorchDispatchMode):
    """Notes the largest tensor that is made on the CPU."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_cpu:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize(
    "operator",
    [
        SRHT(2**19 - 5, 64, seed=0),
        AFFD(2**19 - 5, 64, seed=0),
        AFJL(2**19 - 5, 2**18 + 5, seed=0),
        FFD(2**14 - 5, 64, seed=0),
    ],
    ids=repr,
)
def test_flat_operators_draw_nothing_large_on_the_cpu(operator):
    with OnTheCpu() as seen:
        operator @ torch.zeros(operator.in_size, device=ELSEWHERE)
        operator.T @ torch.zeros(operator.out_size, device=ELSEWHERE)
    assert 0 < seen.largest <= MOST


def test_devices_without_float64_get_their_numbers_from_the_cpu():
    assert drawing(torch.device("mps")).type == "cpu"
    assert drawing(ELSEWHERE) == ELSEWHERE


class Away(torch.Tensor):
    """Says that it lies elsewhere."""

    is_cpu = False


def test_an_order_is_the_same_wherever_it_is_drawn():
    words = CounterRandom(0, "words").words(0, 3000).view(3, 1000) & -4  # some equal
    got = ascending_order(words.as_subclass(Away))
    assert torch.equal(got.as_subclass(torch.Tensor), ascending_order(words))
