"""The rule of linear layers."""

from collections.abc import Iterator

from torch import Tensor, nn

from hf_sketch.examples.rules.base import Call, Contribution, Rule, is_kept, tokens
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.sketches.outer import Side

Saved = tuple[ExampleSplit, Tensor | Side]


class Linear(Rule):
    """y = W x + b, or y = x W + b, as in Conv1D of Transformers.

    Args:
        input_side: the dimension of the weight along which inputs lie.
    """

    def __init__(
        self, module: nn.Module, path: str, names: dict[str, str], input_side: int
    ) -> None:
        super().__init__(module, path, names)
        self.input_side = input_side

    def forward(self, call: Call) -> Saved | None:
        if not call.has_input or call.split.within(call.input) is None:
            return None
        x = call.input
        if is_kept(x, call.output) or "weight" not in self.names:
            return call.split, x
        # It would be held for us alone: better less of it.
        name, given = self.names["weight"], tokens(call.split, x)
        folded = call.sums.fold(name, given, self.input_side)
        return call.split, folded if isinstance(folded, Side) else x

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, x = saved
        x = tokens(split, x) if isinstance(x, Tensor) else x
        y = tokens(split, gradient)
        left, right = (y, x) if self.input_side else (x, y)
        yield "weight", left, right
        if "bias" in self.names:
            yield "bias", y.sum(1), None
