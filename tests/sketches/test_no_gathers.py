"""AFFD, AFJL, QK and Grouped look nothing up by index: the paper's point on TPUs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, Grouped

LOOK_UPS = ("gather", "scatter", "index", "take", "embedding")
MIXES = ("hadamard", "fft", "kronecker")


def look_ups(function, size):
    """Names of the operations of the traced graph that read or write by index."""
    function(torch.randn(size))  # draws the operator's own numbers, once
    graph = make_fx(function)(torch.randn(size)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert names  # the trace saw the operator's work
    return {name for name in names if any(word in name for word in LOOK_UPS)}


@pytest.mark.parametrize(
    "operator",
    [
        *(AFFD(1000, 64, 0, mix=mix) for mix in MIXES),
        *(AFFD(1000, 64, 0, 128, mix=mix) for mix in MIXES),
        *(AFJL(1000, 64, 0, 128, mix=mix) for mix in MIXES),
        QK(1000, 64, 0),
        Grouped(1000, 64, 0, (40, 25), (32, 16)),
        Grouped(1000, 64, 0, (4, 10, 25), (16, 16)),
    ],
    ids=repr,
)
def test_there_are_no_look_ups(operator):
    assert look_ups(lambda x: operator @ x, operator.in_size) == set()
    assert look_ups(lambda y: operator.T @ y, operator.out_size) == set()


@pytest.mark.parametrize("operator", [FJL(1000, 64, 0), FFD(1000, 64, 0)], ids=repr)
def test_the_operators_with_look_ups_are_recognized(operator):
    assert look_ups(lambda x: operator @ x, operator.in_size)
