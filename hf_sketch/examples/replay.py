"""Per-example gradients of modules of any kind, by running them again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves, tree_map

from hf_sketch.examples.rounding import agree
from hf_sketch.examples.rules.base import Rule
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import call_with
from hf_sketch.model.state import kept_random_state


@dataclass(frozen=True)
class Replay:
    """One call of a module, kept so that it can be run again for each example.

    Every example's share of the inputs is run alone. If that does not give its share of
    the outputs (dropout, examples that are not the leading dimension), the whole call
    is repeated with the random numbers that it had, and differentiated once per
    example.

    Args:
        rule: the module's, which names it in errors.
        parameters: attributes that train, dotted where they lie in a container.
        others: the module's other parameters, where it does not keep them.
        args: of the call.
        kwargs: of the call.
        outputs: the tensors it returned, in the order of `tensors_of`.
        random_state: of torch's CPU and the module's device when it was called.
        output_gradients: of `outputs`, once they are there.
    """

    rule: Rule
    parameters: dict[str, Tensor]
    others: dict[str, Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Sequence[Tensor]
    random_state: tuple[Tensor, ...]
    output_gradients: list[Tensor | None]

    @classmethod
    def of_call(
        cls,
        rule: Rule,
        parameters: dict[str, Tensor],
        args: Any,
        kwargs: Any,
        outputs: Sequence[Tensor],
        random_state: tuple[Tensor, ...],
    ) -> "Replay":
        """Keep a call's inputs and outputs, cut off from its graph."""
        args, kwargs = tree_map(_detached, (args, kwargs))
        detached = [output.detach() for output in outputs]
        none: list[Tensor | None] = [None] * len(detached)
        return cls(rule, parameters, {}, args, kwargs, detached, random_state, none)

    def keep_parameters(self) -> "Replay":
        """Return the same with copies of all parameters, which FSDP2 gives up.

        Raises:
            ValueError: the module holds a unit of FSDP2.
        """
        module = self.rule.module
        within = [part for part in module.modules() if part is not module]
        if any(isinstance(part, FSDPModule) for part in within):
            raise ValueError(
                "fully_shard must not be called within a module that is run again "
                f"for each example, got {self.rule}: call it on the module, or on one "
                "around it, or pass per_example=False."
            )
        everything = module.named_parameters(remove_duplicate=False)
        others = {name: p.detach().clone() for name, p in everything}
        parameters = {name: others.pop(name) for name in self.parameters}
        return replace(self, parameters=parameters, others=others)

    def gradients(self, split: ExampleSplit) -> Iterator[dict[str, Tensor]]:
        """Yield each example's gradients of the module's parameters, by attribute.

        Raises:
            RuntimeError: a repetition gave other outputs than the call.
        """
        if all(gradient is None for gradient in self.output_gradients):
            return
        alone = True
        for index in range(split.size):
            gradients = self._alone(split, index) if alone else None
            if gradients is None:
                alone, gradients = False, self._in_batch(split, index)
            yield gradients

    def _alone(self, split: ExampleSplit, index: int) -> dict[str, Tensor] | None:
        """Return gradients of a call with one example; None if it differs."""

        def share(x: Any) -> Any:
            return split.part(x, index) if isinstance(x, Tensor) else x

        kept = self.args, self.kwargs, self.outputs, self.output_gradients
        return self._run(*tree_map(share, kept))

    def _in_batch(self, split: ExampleSplit, index: int) -> dict[str, Tensor]:
        """Return one example's gradients from a repetition of the whole call."""
        masked = [
            None if g is None else split.mask(g, index) for g in self.output_gradients
        ]
        gradients = self._run(self.args, self.kwargs, self.outputs, masked)
        if gradients is None:
            raise RuntimeError(
                "a module must give the same outputs when it is run again, got others "
                f"from {self.rule}: freeze its parameters with requires_grad_(False), "
                "or pass per_example=False."
            )
        return gradients

    def _run(
        self,
        args: Any,
        kwargs: Any,
        expected: Sequence[Tensor],
        output_gradients: Sequence[Tensor | None],
    ) -> dict[str, Tensor] | None:
        """Return gradients of a repetition; None if its outputs are not as expected."""
        parameters = {
            n: p.detach().requires_grad_() for n, p in self.parameters.items()
        }
        device = next(iter(parameters.values())).device
        with kept_random_state(self.random_state, device), torch.enable_grad():
            everything = {**self.others, **parameters}
            got = call_with(self.rule.module, everything, args, kwargs)
        outputs = [
            _expand(output, wanted)
            for output, wanted in zip(tensors_of(got), expected, strict=True)
        ]
        pairs = zip(outputs, expected, strict=True)
        if not all(agree(output, wanted, "output") for output, wanted in pairs):
            return None
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, output_gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if not used:
            return {}
        gradients = list[Tensor | None](
            torch.autograd.grad(
                [output for output, _ in used],
                list(parameters.values()),
                [gradient for _, gradient in used],
                allow_unused=True,
            )
        )
        named = zip(parameters, gradients, strict=True)
        return {name: gradient for name, gradient in named if gradient is not None}


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output."""
    leaves = tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _expand(x: Tensor, like: Tensor) -> Tensor:
    """An output that examples share, given to each of them."""
    if x.dim() < like.dim() and x.shape == like.shape[-x.dim() :]:
        return x.expand_as(like)
    if x.dim() and len(x) == 1 and x.shape[1:] == like.shape[1:]:
        return x.expand_as(like)
    return x
