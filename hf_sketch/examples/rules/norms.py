"""The rules of normalizing layers."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from hf_sketch.examples.rounding import agree
from hf_sketch.examples.rules.base import Call, Contribution, Rule, over_tokens
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import call_with
from hf_sketch.model.zero import whole_shape
from hf_sketch.sketches.transforms.lazy import reads_freely

_PLAIN: Final = {1.0: 1.0}  # the slope of y = w * n


class LayerNorm(Rule):
    """y = W * normalized(x) + b."""

    def forward(self, call: Call) -> tuple[ExampleSplit, Tensor] | None:
        return (call.split, call.input) if call.has_input else None

    def backward(
        self, saved: tuple[ExampleSplit, Tensor], gradient: Tensor
    ) -> Iterator[Contribution]:
        split, x = saved
        module: Any = self.module
        shape = list(module.normalized_shape)
        normalized = functional.layer_norm(x.to(gradient), shape, eps=module.eps)
        for name, part in (("weight", gradient * normalized), ("bias", gradient)):
            yield name, over_tokens(split, part, len(shape)), None


@dataclasses.dataclass(frozen=True)
class _Slope:
    """How a call's output changes with w; the rule may forget, as a later call comes.

    Args:
        call: the call, without its output.
        factors: factors of the outputs at constant w, whose sum is n.
    """

    call: Call
    factors: dict[float, float]


class Elementwise(Rule):
    """One vector w and y = (w + c) * n or y = offset + w * n, as RMSNorms compute.

    Covers every spelling: n is what the module gives at w = 1 less what it gives at
    w = 0. The first call checks that y is linear in w, coordinate by coordinate.
    """

    def __init__(self, module: nn.Module, path: str, names: dict[str, str]) -> None:
        super().__init__(module, path, names)
        # Factors of the outputs at constant w whose sum is n; empty if not linear.
        self.forget()
        self._like: Tensor | None = None  # of the dtype and device that w has in calls

    def forget(self) -> None:
        self.slope: dict[float, float] | None = None
        self._constants: dict[float, Tensor] = {}

    def forward(
        self, call: Call
    ) -> _Slope | tuple[ExampleSplit, Tensor, Tensor] | None:
        weight = self._weight
        if self.slope is None:
            self._like = weight.detach().new_empty(0)
            self.slope = self._learn(call, weight)
        if not self.slope:
            return None
        whole = not isinstance(self.module, FSDPModule)  # also in the backward pass
        if self.slope == _PLAIN and whole and _divides_well(weight):
            return call.split, call.output, weight.detach()
        return _Slope(dataclasses.replace(call, output=self._like), self.slope)

    def backward(
        self, saved: _Slope | tuple[ExampleSplit, Tensor, Tensor], gradient: Tensor
    ) -> Iterator[Contribution]:
        (name,) = self.names
        if isinstance(saved, _Slope):
            outputs = [self._output_at(saved.call, w) for w in saved.factors]
            if saved.factors == _PLAIN:
                (n,) = outputs
            else:
                n = sum(map(operator.mul, saved.factors.values(), outputs))
            yield name, over_tokens(saved.call.split, gradient * n), None
        else:
            split, y, w = saved
            yield name, over_tokens(split, gradient * y) / w, None

    @property
    def _weight(self) -> Tensor:
        """Its only parameter, or what another has put in its place."""
        (name,) = self.names
        return getattr(self.module, name)

    def _learn(self, call: Call, weight: Tensor) -> dict[float, float]:
        """Return the slope; empty if y is not linear in w."""
        if call.output.shape[-1:] != weight.shape:
            return {}
        offset, one = self._output_at(call, 0.0), self._output_at(call, 1.0)
        ramp = torch.linspace(1, 2, len(weight)).to(weight)
        foretold = offset + ramp * (one - offset)
        if not agree(self._output_at(call, ramp), foretold, "rule"):
            return {}
        if not offset.any():
            return _PLAIN
        return {0.0: 1.0} if agree(one, 2 * offset, "rule") else {1.0: 1.0, 0.0: -1.0}

    def _output_at(self, call: Call, w: float | Tensor) -> Tensor:
        """Return what the module gives with another weight."""
        (name,) = self.names
        assert self._like is not None
        if isinstance(w, Tensor):
            weight = w
        else:
            if w not in self._constants:
                shape = whole_shape(self._weight)
                self._constants[w] = self._like.new_full(shape, w)
            weight = self._constants[w]
        with torch.no_grad():
            return call_with(self.module, {name: weight}, call.args, call.kwargs)


def _divides_well(weight: Tensor) -> bool:
    """Return whether y = w * n gives n back with nearly all of its bits."""
    if not reads_freely(weight):
        return False  # to know would take longer than to compute n again
    least, largest = weight.detach().abs().aminmax()
    return weight.element_size() >= 4 and bool(least > 1e-4 * largest)
