"""The rule of linear layers."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from hf_sketch.examples.named_sums import Sums
from hf_sketch.examples.rounding import agree
from hf_sketch.examples.rules.base import Call, Contribution, Rule, tokens
from hf_sketch.examples.split import ExampleSplit

Saved = tuple[ExampleSplit, Sums, Tensor]


class Linear(Rule):
    """y = W x + b, or y = x W + b, as in Conv1D of Transformers.

    A module with a forward pass of its own shows by its first call whether it is one.

    Args:
        input_side: the dimension of the weight along which inputs lie; None to find
            out.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        names: dict[str, str],
        input_side: int | None = None,
    ) -> None:
        super().__init__(module, path, names)
        self._known_side = input_side
        self.forget()

    def forget(self) -> None:
        self.input_side = self._known_side
        self._applies = True

    def forward(self, call: Call) -> Saved | None:
        if not (self._applies and call.has_input):
            return None
        if self.input_side is None:
            self.input_side = self._find_side(call)
            self._applies = self.input_side is not None
        if self.input_side is None or call.split.within(call.input) is None:
            return None
        x = tokens(call.split, call.input)
        return call.split, call.sums, self.fold(call.sums, "weight", x, self.input_side)

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, sums, x = saved
        gradient = tokens(split, gradient)
        assert self.input_side is not None
        y = self.fold(sums, "weight", gradient, 1 - self.input_side)
        yield "weight", *((y, x) if self.input_side else (x, y))
        if "bias" in self.names:
            yield "bias", gradient.sum(1), None

    def _find_side(self, call: Call) -> int | None:
        """Return the side whose product is the output, if there is one."""
        x, weight = call.input, self.module.get_parameter("weight").detach()
        bias = getattr(self.module, "bias", None)
        for side in (1, 0):
            matrix = weight if side else weight.T
            if x.is_floating_point() and x.shape[-1:] == matrix.shape[1:]:
                product = functional.linear(x.to(matrix), matrix, bias)
                if agree(call.output, product.to(call.output), "rule"):
                    return side
        return None
