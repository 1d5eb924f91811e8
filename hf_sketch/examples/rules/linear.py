"""The rule of linear layers."""

from collections.abc import Iterator

from torch import Tensor, nn

from hf_sketch.examples.rules.base import Call, Contribution, Rule, tokens
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.accumulator import Accumulator

Saved = tuple[ExampleSplit, Accumulator, Tensor]


class Linear(Rule):
    """y = W x + b; or y = x W + b, as in Conv1D of Transformers."""

    def forward(self, call: Call) -> Saved:
        x = tokens(call.split, call.input)
        return call.split, call.sums, self.fold(call.sums, "weight", x, self.input_side)

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, sums, x = saved
        gradient = tokens(split, gradient)
        y = self.fold(sums, "weight", gradient, 1 - self.input_side)
        yield "weight", *((y, x) if self.input_side else (x, y))
        if "bias" in self.names:
            yield "bias", gradient.sum(1), None

    @property
    def input_side(self) -> int:
        """The dimension of the weight along which inputs lie."""
        return 1 if isinstance(self.module, nn.Linear) else 0
