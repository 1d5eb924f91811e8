"""What a device does in a second, as far as a plan has to know."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.transforms.folding import fold

_ROUNDS: Final = 50
_SIDE: Final = 1024  # of the matrices that are multiplied
_ROWS, _WIDTH = 65536, 512  # of what is folded: more than caches hold
_MODULES: Final = 32


@dataclass(frozen=True)
class Machine:
    """A device that trains.

    The defaults are rough ones of a data-centre GPU with 16-bit training: give those of
    your own.

    Args:
        flops_per_second: that large matrix products of training reach, not the data
            sheet's.
        float32_flops_per_second: that those in float32 reach, as a sketch takes them.
        bytes_per_second: that elementwise operations read and write.
        seconds_per_call: of Python and of launching kernels, to sketch one call of a
            layer; training it is taken to need as much.
        disk_bytes_per_second: at which one process reads the store.
        memory_bytes: of the device.
    """

    flops_per_second: float = 6e14
    float32_flops_per_second: float = 5e13
    bytes_per_second: float = 2e12
    seconds_per_call: float = 2e-4
    disk_bytes_per_second: float = 7e8
    memory_bytes: float = 8e10

    @classmethod
    def measured(cls) -> "Machine":
        """This machine's processor in float32; disk and memory are not measured."""
        matrix, rows = torch.ones(_SIDE, _SIDE), torch.ones(_ROWS, _WIDTH)
        signs = torch.ones(_WIDTH)
        flops = 2 * _SIDE**3 / _least_seconds(lambda: matrix @ matrix)
        moved = 3 * rows.nbytes / _least_seconds(lambda: fold(rows, signs, 64))
        model = _Modules()
        sketcher = ExampleSketcher(model, ModelSketch.from_model(model, 16, "factored"))
        plain = _least_seconds(model.pass_through)
        with sketcher:
            recorded = _least_seconds(lambda: [model.pass_through(), sketcher.take()])
        return cls(flops, flops, moved, max(recorded - plain, 0.0) / _MODULES)


class _Modules(nn.Module):
    """Many modules with next to nothing to compute."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(_MODULES)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()

    def pass_through(self) -> None:
        """A forward and a backward pass."""
        self(x=torch.ones(2, 2, 8)).backward()


def _least_seconds(action: Callable[[], Any]) -> float:
    """The shortest of some rounds, after one that warms up."""
    action()
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
