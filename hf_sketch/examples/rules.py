"""How each kind of module's weights get their per-example gradients."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import call_with
from hf_sketch.sketches.transforms.lazy import is_lazy


class Contribution(NamedTuple):
    """A parameter's per-example gradients.

    Without `right`, row i of `left` (b, size) is example i's gradient; with it, example
    i's gradient is sum_t left[i, t] (x) right[i, t], and integer `left` (b, t) stands
    for one-hot vectors.
    """

    attribute: str
    left: Tensor
    right: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Args:
        module: that was called.
        args: its positional arguments.
        output: what it returned.
        split: the batch's examples.
        kwargs: its named arguments.
        fold: keeps what the sketch needs of one side (0 left, 1 right) of a
            parameter's outer products.
        learned: what a rule found out about the module on its first call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    output: Tensor
    split: ExampleSplit
    kwargs: dict[str, Any]
    fold: Callable[[str, Tensor, int], Tensor]
    learned: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return (*self.args, *self.kwargs.values())[0].detach()


# Of the gradient of a call's output, the parameters' per-example gradients.
Backward = Callable[[Tensor], Iterable[Contribution]]
# Of a call, what is to be done with its output's gradient; None if it does not apply.
Rule = Callable[[Call], Backward | None]


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that may fit the module's forward pass, or None.

    Raises:
        ValueError: the module's per-example gradients depend on the whole batch.
    """
    if isinstance(module, nn.Embedding):
        _check_embedding(module)
    # FSDP2 derives a class of its own from this one.
    kind = type(module).__mro__[2 if isinstance(module, FSDPModule) else 0]
    known = _RULES.get(kind.forward)
    if known is None and kind.__name__ == "Conv1D":
        known = _conv1d_of_gpt2 if kind.__module__.startswith("transformers.") else None
    if known is None and isinstance(module, nn.Embedding):
        return _scaled_embedding
    if known is None and [p.dim() for p in module.parameters()] == [1]:
        return _elementwise
    return known


def _linear(call: Call) -> Backward:
    """Linear: y = W x + b."""
    split, fold = call.split, call.fold
    has_bias = isinstance(call.module.bias, Tensor)
    x = fold("weight", _tokens(split, call.input), 1)

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        gradient = _tokens(split, gradient)
        yield Contribution("weight", fold("weight", gradient, 0), x)
        if has_bias:
            yield Contribution("bias", gradient.sum(1))

    return backward


def _conv1d_of_gpt2(call: Call) -> Backward:
    """Conv1D of Transformers, a Linear with its weight transposed: y = x W + b."""
    split, fold = call.split, call.fold
    x = fold("weight", _tokens(split, call.input), 0)

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        gradient = _tokens(split, gradient)
        yield Contribution("weight", x, fold("weight", gradient, 1))
        yield Contribution("bias", gradient.sum(1))

    return backward


def _embedding(call: Call, scale: float = 1.0) -> Backward | None:
    """Embedding: y = scale * W[ids]; the padding row gets no gradient."""
    module, ids = call.module, call.split.rows(call.input)
    assert isinstance(module, nn.Embedding)
    if ids is None:
        return None
    ids = ids.flatten(1)
    split, fold = call.split, call.fold
    left = fold("weight", ids, 0)
    padding = -1 if module.padding_idx is None else module.padding_idx
    counted = scale * (ids != padding).unsqueeze(-1)

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        right = _tokens(split, gradient) * counted
        yield Contribution("weight", left, fold("weight", right, 1))

    return backward


def _scaled_embedding(call: Call) -> Backward | None:
    """An Embedding with a forward pass of its own that may only scale."""
    module, ids = call.module, call.input
    assert isinstance(module, nn.Embedding)
    if (
        ids.is_floating_point()
        or (*ids.shape, module.embedding_dim) != call.output.shape
    ):
        return None
    if "scale" not in call.learned:
        plain = functional.embedding(ids, module.weight).to(call.output.dtype)
        energy = plain.square().sum()
        scale = float((call.output * plain).sum() / energy) if energy > 0 else 0.0
        call.learned["scale"] = scale if _agree(call.output, scale * plain) else None
    scale = call.learned["scale"]
    return None if scale is None else _embedding(call, scale)


def _convolution(call: Call) -> Backward | None:
    """Convolution of any dimension: y[o, p] = sum_i W[o, i] patch_p[i] + b[o]."""
    module: Any = call.module
    x, examples = call.input, call.split.size
    if call.split.starts or module.groups != 1 or module.padding_mode != "zeros":
        return None

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        left = gradient.flatten(2).transpose(1, 2)
        left = left.reshape(examples, -1, left.shape[-1])
        right = _patches(module, x).reshape(examples, left.shape[1], -1)
        yield Contribution("weight", left, right)
        yield Contribution("bias", left.sum(1))

    return backward


def _patches(module: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies: (b, c, ...) -> (b, places, c * offsets)."""
    x = functional.pad(x, module._reversed_padding_repeated_twice)
    geometry = (module.kernel_size, module.stride, module.dilation)
    for axis, (size, stride, dilation) in enumerate(zip(*geometry, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    axes = len(module.kernel_size)
    return x.movedim(1, 1 + axes).flatten(1, axes).flatten(2)


def _layer_norm(call: Call) -> Backward:
    """LayerNorm: y = W * normalised(x) + b."""
    module, x, split = call.module, call.input, call.split
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        normalised = functional.layer_norm(x.to(gradient), shape, eps=module.eps)
        dims = len(shape)
        for name, part in (("weight", gradient * normalised), ("bias", gradient)):
            yield Contribution(name, _over_tokens(split, part, dims))

    return backward


def _elementwise(call: Call) -> Backward | None:
    """A module with one vector w and y = (w + c) * n or offset + w * n, as RMSNorms.

    Covers every spelling: n is what the module gives at w = 1 less what it gives at
    w = 0. That y is linear in w, coordinate by coordinate, is checked on its first
    call.
    """
    if "slope" not in call.learned:
        call.learned["slope"] = _learn_slope(call)
    slope: dict[float, float] | None = call.learned["slope"]
    if slope is None:
        return None
    ((name, weight),) = call.module.named_parameters()
    whole = not isinstance(call.module, FSDPModule)  # also in the backward pass
    if slope == {1.0: 1.0} and whole and _divides_well(weight):
        y, w, split = call.output, weight.detach(), call.split

        def quotient(gradient: Tensor) -> Iterator[Contribution]:
            yield Contribution(name, _over_tokens(split, gradient * y, 1) / w)

        return quotient
    inputs = dataclasses.replace(call, output=call.output[:0])

    def backward(gradient: Tensor) -> Iterator[Contribution]:
        n = sum(factor * _output_at(inputs, w) for w, factor in slope.items())
        yield Contribution(name, _over_tokens(inputs.split, gradient * n, 1))

    return backward


def _divides_well(weight: Tensor) -> bool:
    """Whether y = w * n gives n back with nearly all of its bits."""
    if is_lazy(weight):
        return False  # to know would take longer than to compute n again
    sizes = weight.detach().abs()
    return weight.element_size() >= 4 and bool(sizes.min() > 1e-4 * sizes.max())


def _learn_slope(call: Call) -> dict[float, float] | None:
    """Factors of the outputs at constant w whose sum is dy/dw; None if not linear."""
    (weight,) = call.module.parameters()
    if call.output.shape[-1:] != weight.shape:
        return None
    offset, one = _output_at(call, 0.0), _output_at(call, 1.0)
    ramp = torch.linspace(1, 2, len(weight)).to(weight)
    if not _agree(_output_at(call, ramp), offset + ramp * (one - offset)):
        return None
    if not offset.any():
        return {1.0: 1.0}
    return {0.0: 1.0} if _agree(one, 2 * offset) else {1.0: 1.0, 0.0: -1.0}


def _output_at(call: Call, w: float | Tensor) -> Tensor:
    """What the module gives with another weight."""
    ((name, weight),) = call.module.named_parameters()
    like: Tensor = call.learned.setdefault("like", weight.detach().new_empty(0))
    w = w if isinstance(w, Tensor) else like.new_full(weight.shape, w)
    with torch.no_grad():
        return call_with(call.module, {name: w}, call.args, call.kwargs)


def _tokens(split: ExampleSplit, x: Tensor) -> Tensor:
    """All dimensions between the example and the features merged: (b, t, f)."""
    rows = split.rows(x)
    assert rows is not None
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _over_tokens(split: ExampleSplit, x: Tensor, features: int) -> Tensor:
    """The sum over each example's tokens: (b, number of features)."""
    rows = split.rows(x.flatten(x.dim() - features))
    assert rows is not None
    return rows.reshape(len(rows), -1, rows.shape[-1]).sum(1)


def _agree(got: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    tolerance = min(max(1e3 * torch.finfo(got.dtype).eps, 1e-4), 5e-2)
    distance = torch.linalg.vector_norm((got - expected).to(torch.float32))
    norm = torch.linalg.vector_norm(got.to(torch.float32))
    return bool(distance <= tolerance * norm)


def _check_embedding(module: nn.Embedding) -> None:
    """Raise if an example's gradient depends on its batch-mates."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            "per-example gradients need an Embedding without max_norm, "
            f"scale_grad_by_freq and sparse, got max_norm={module.max_norm}, "
            f"scale_grad_by_freq={module.scale_grad_by_freq}, sparse={module.sparse}: "
            "turn them off, or pass per_example=False."
        )


_RULES: dict[Callable[..., Tensor], Rule] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
}
