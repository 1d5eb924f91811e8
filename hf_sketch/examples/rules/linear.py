"""The rule of linear layers."""

from collections.abc import Iterator

from torch import Tensor, nn

from hf_sketch.examples.named_sums import Sums
from hf_sketch.examples.rules.base import Call, Contribution, Rule, is_kept, tokens
from hf_sketch.examples.split import ExampleSplit

Saved = tuple[ExampleSplit, Sums, Tensor, bool]  # whether the input is folded


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
        x, kept = call.input, is_kept(call.input, call.output)
        if not kept:  # for us alone: better less of it
            x = self._fold_input(call.split, call.sums, x)
        return call.split, call.sums, x, not kept

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, sums, x, folded = saved
        if not folded:
            x = self._fold_input(split, sums, x)
        gradient = tokens(split, gradient)
        y = self.fold(sums, "weight", gradient, 1 - self.input_side)
        yield "weight", *((y, x) if self.input_side else (x, y))
        if "bias" in self.names:
            yield "bias", gradient.sum(1), None

    def _fold_input(self, split: ExampleSplit, sums: Sums, x: Tensor) -> Tensor:
        return self.fold(sums, "weight", tokens(split, x), self.input_side)
