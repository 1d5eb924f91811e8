"""The rule of modules that multiply by their parameters in ways of their own."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.rules.base import (
    Call,
    Contribution,
    Rule,
    over_tokens,
    tokens,
)
from hf_sketch.examples.rules.use_trace import Use, UseTrace
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import Routed


class _Uses:
    """All uses of a parameter in one call, until the last one's gradient is there.

    Args:
        call: the call.
        uses: uses of the parameter.
    """

    def __init__(self, call: Call, uses: list[Use]) -> None:
        self.split, self.uses = call.split, uses
        self.gradients: dict[int, Tensor] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all gradients are there."""
        return len(self.gradients) == len(self.uses)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return expert, example and output gradient of each row, of all uses."""
        gradients = [
            self.gradients[place].reshape(len(use.token), -1)
            for place, use in enumerate(self.uses)
        ]
        expert = torch.cat([use.expert for use in self.uses if use.expert is not None])
        owner = self._owner(self.uses[0])
        example = torch.cat([owner[use.token] for use in self.uses])
        return expert, example, torch.cat(gradients)

    def _owner(self, use: Use) -> Tensor:
        """Return the example of each token."""
        owner = use.token.new_empty(use.tokens)
        for index in range(self.split.size):
            self.split.part(owner, index).fill_(index)
        return owner


class Uses(Rule):
    """y = W x + b within a module's forward pass, which is watched for it.

    So do routers, and experts: y = W_e x + b_e for each token x and each expert e that
    it is routed to, one expert after the other, by products with gathered weights or by
    grouped ones. The gradient of an expert's weight is the sum of outer products over
    an example's tokens there.
    """

    def __init__(self, module: nn.Module, path: str, names: dict[str, str]) -> None:
        super().__init__(module, path, names)
        self.expands = False
        self.within = True
        self._trace: UseTrace | None = None

    def open(self, current: Callable[[], object]) -> list[Callable[[], object]]:
        module: Any = self.module
        before, plain = module.__dict__.get("forward"), module.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._trace = None
            x = next(iter((*args, *kwargs.values())), None)
            if self.runs_again or not current() or not isinstance(x, Tensor):
                return plain(*args, **kwargs)
            parameters = {name: module.get_parameter(name) for name in self.names}
            with UseTrace(parameters, x) as trace:
                output = plain(*args, **kwargs)
            self._trace = trace
            return output

        def close() -> None:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.forward = before

        module.forward = forward
        return [close]

    def forward(self, call: Call) -> list[_Uses] | None:
        trace, self._trace = self._trace, None
        found = [] if trace is None else trace.found()
        self.runs_again = self.runs_again or not found
        by_attribute: dict[str, list[Use]] = {}
        for use in found:
            if call.split.within(use.token.new_empty(use.tokens)) is None:
                return None
            by_attribute.setdefault(use.attribute, []).append(use)
        if any(
            use.expert is None and len(some) > 1
            for some in by_attribute.values()
            for use in some
        ):
            return None
        return [_Uses(call, some) for some in by_attribute.values()] or None

    def watched(
        self, saved: list[_Uses], output: Tensor
    ) -> Iterator[tuple[Any, Tensor]]:
        for uses in saved:
            for place, use in enumerate(uses.uses):
                yield (uses, place), use.release()

    def backward(
        self, saved: tuple[_Uses, int], gradient: Tensor
    ) -> Iterator[Contribution]:
        uses, place = saved
        uses.gradients[place] = gradient
        if uses.uses[place].expert is None:
            yield self._contribution(uses, uses.uses[place], gradient)
        elif uses.is_complete:
            yield from _contributions(uses)
            uses.gradients.clear()

    def _contribution(self, uses: _Uses, use: Use, gradient: Tensor) -> Contribution:
        """Return the gradients of a parameter that is used as a whole."""
        gradient = gradient.reshape(use.tokens, -1)
        if use.input is None:
            return use.attribute, over_tokens(uses.split, gradient), None
        sides = tokens(uses.split, use.input), tokens(uses.split, gradient)
        left, right = sides if use.input_first else sides[::-1]
        return use.attribute, left, right


def _contributions(uses: _Uses) -> Iterator[Contribution]:
    """Yield the gradients of all experts' slices of one parameter."""
    expert, example, right = uses.joined()
    first, examples = uses.uses[0], uses.split.size
    experts, attribute = first.experts, first.attribute
    if first.input is None:
        right = right.to(accumulation_dtype(right.dtype))
        rows = right.new_zeros(examples * experts, right.shape[1])
        rows.index_add_(0, example * experts + expert, right)
        yield attribute, rows.view(examples, -1), None
        return
    left = torch.cat([use.input for use in uses.uses if use.input is not None])
    if not first.input_first:
        left, right = right, left
    yield attribute, left, Routed(right, example, expert, examples, experts)
