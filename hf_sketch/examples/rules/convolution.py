"""The rule of convolutions."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional

from hf_sketch.examples.rules.base import Call, Contribution, Rule, summed, tokens
from hf_sketch.examples.split import ExampleSplit, Packed


class Convolution(Rule):
    """y[o, p] = sum_i W[o, i] patch_p[i] + b[o], in any number of dimensions."""

    def forward(self, call: Call) -> tuple[ExampleSplit, Tensor] | None:
        module: Any = self.module
        packed = isinstance(call.split, Packed)
        if packed or module.groups != 1 or module.padding_mode != "zeros":
            return None
        return call.split, call.input

    def backward(
        self, saved: tuple[ExampleSplit, Tensor], gradient: Tensor
    ) -> Iterator[Contribution]:
        split, x = saved
        left = tokens(split, gradient.flatten(2).transpose(1, 2))
        right = tokens(split, _patches(self.module, x))
        yield "weight", left, right
        yield "bias", summed(left), None


def _patches(module: Any, x: Tensor) -> Tensor:
    """Return what a convolution multiplies: (b, c, ...) -> (b, places, c * offsets)."""
    x = functional.pad(x, _padding(module))
    geometry = (module.kernel_size, module.stride, module.dilation)
    for axis, (size, stride, dilation) in enumerate(zip(*geometry, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    axes = len(module.kernel_size)
    return x.movedim(1, 1 + axes).flatten(1, axes).flatten(2)


def _padding(module: Any) -> list[int]:
    """Return the zeros before and after each axis, the last axis first."""
    sizes = list(zip(module.kernel_size, module.dilation, strict=True))
    if module.padding == "same":
        totals = [dilation * (size - 1) for size, dilation in sizes]
    elif module.padding == "valid":
        totals = [0] * len(sizes)
    else:
        totals = [2 * padding for padding in module.padding]
    pairs = [(total // 2, total - total // 2) for total in reversed(totals)]
    return [zeros for pair in pairs for zeros in pair]
