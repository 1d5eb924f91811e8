"""The rule of linear layers."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from hf_sketch.examples.rules.base import (
    Call,
    Contribution,
    Rule,
    is_kept,
    summed,
    tokens,
)
from hf_sketch.examples.rules.shared_inputs import SharedSide
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.sketches.outer import Side

Saved = tuple[ExampleSplit, Tensor | Side | SharedSide]


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
        x, name, split = call.input, self.names.get("weight"), call.split
        if name is None:
            return split, x
        kept = is_kept(x, call.output)
        if call.shared is not None:
            of = name, self.input_side, x
            shared = call.shared.take(*of, partial(tokens, split), kept)
            if shared is not None:
                return split, shared
        if kept:
            return split, x
        # It would be held for us alone: better less of it.
        folded = call.sums.fold(name, tokens(split, x), self.input_side)
        return split, folded if isinstance(folded, Side) else x

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, x = saved
        if isinstance(x, SharedSide):
            x = x.turned()
        x = tokens(split, x) if isinstance(x, Tensor) else x
        y = tokens(split, gradient)
        left, right = (y, x) if self.input_side else (x, y)
        yield "weight", left, right
        if "bias" in self.names:
            yield "bias", summed(y), None
