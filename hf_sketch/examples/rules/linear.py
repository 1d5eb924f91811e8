"""The rule of linear layers."""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from hf_sketch.examples.rules.base import Call, Contribution, Rule, tokens
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.accumulator import Accumulator


class Linear(Rule):
    """y = W x + b; or y = x W + b, as Conv1D of Transformers stores its weight.

    Args:
        module: see `Rule`.
        path: see `Rule`.
        names: see `Rule`.
        input_side: dimension of the weight along which inputs lie.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        names: dict[str, str],
        input_side: Literal[0, 1] = 1,
    ) -> None:
        super().__init__(module, path, names)
        self.input_side = input_side

    def forward(self, call: Call) -> tuple[ExampleSplit, Accumulator, Tensor]:
        x = tokens(call.split, call.input)
        return call.split, call.sums, self.fold(call.sums, "weight", x, self.input_side)

    def backward(
        self, saved: tuple[ExampleSplit, Accumulator, Tensor], gradient: Tensor
    ) -> Iterator[Contribution]:
        split, sums, x = saved
        gradient = tokens(split, gradient)
        y = self.fold(sums, "weight", gradient, 1 - self.input_side)
        yield "weight", *((y, x) if self.input_side else (x, y))
        if "bias" in self.names:
            yield "bias", gradient.sum(1), None
