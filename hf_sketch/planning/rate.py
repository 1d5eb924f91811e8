"""How fast this machine sketches, measured."""

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.planning.batch import BatchShape, batch_cost
from hf_sketch.planning.settings import RowSettings

_ROUNDS: Final = 5
_LAYERS, _WIDTH = 8, 512
_EXAMPLES, _TOKENS = 8, 128


def measured_rate(rows: RowSettings | None = None) -> float:
    """Numbers per second that this machine sketches in training, in float32.

    The accelerator does if there is one. What rows add to the forward and backward
    passes of eight linear layers is timed, and divided into the numbers of
    `batch_cost`.

    Args:
        rows: settings of the rows; None for the callback's defaults.
    """
    rows = rows or RowSettings()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = _Layers().to(device)
    sketch = ModelSketch.from_model(model, rows.out_size, rows.layout, 0, rows.operator)
    x = torch.ones(_EXAMPLES, _TOKENS, _WIDTH, device=device)

    def train() -> None:
        model(x=x).backward()

    added = 0.0
    while added <= 0:  # again where the machine was busy with something else
        plain = _least_seconds(train)
        with ExampleSketcher(model, sketch) as sketcher:
            added = _least_seconds(lambda: [train(), sketcher.take()]) - plain
    shape = BatchShape(_EXAMPLES, _TOKENS, x.element_size())
    return batch_cost(model, sketch, shape).numbers / added


class _Layers(nn.Module):
    """Linear layers and a loss."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()


def _least_seconds(action: Callable[[], Any]) -> float:
    """The shortest of some rounds, after one that warms up."""
    seconds: list[float] = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        action()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
