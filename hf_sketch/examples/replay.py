"""Per-example gradients of modules of any kind, by running them again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_sketch.examples.attempt import attempt
from hf_sketch.examples.rounding import agree, autocast_dtype
from hf_sketch.examples.rules.base import Rule
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import call_with, gathered_within
from hf_sketch.model.gradient_hooks import hooks_of
from hf_sketch.model.state import RandomState, kept_random_state, random_state


@dataclass(frozen=True)
class Replay:
    """One call of a module, kept so that it can be run again for each example.

    Every example's share of the inputs is run alone. If that does not give its share of
    the outputs (dropout, examples that are not the leading dimension), the whole call
    is repeated with the random numbers that it had, and differentiated once per
    example.

    Args:
        rule: the module's.
        names: the sketch's names of the parameters, by attribute.
        parameters: attributes that train, dotted where they lie further within.
        others: the module's other parameters, where it does not keep them.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        outputs: the tensors it returned, in the order of `tensors_of`.
        random_state: when it was called.
        output_gradients: gradients of `outputs`, once known.
        autocast: the dtype that autocast gave to the call; None where it was off.
        versions: versions of `args` and `outputs`; a later version means that the model
            changed the tensor in place.
        rescues: it takes the place of what other rules give.
    """

    rule: Rule
    names: dict[str, str]
    parameters: dict[str, Tensor]
    others: dict[str, Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Sequence[Tensor]
    random_state: RandomState
    output_gradients: list[Tensor | None]
    autocast: torch.dtype | None
    versions: tuple[list[int], list[int]]
    rescues: bool = False

    @classmethod
    def of_call(
        cls,
        rule: Rule,
        names: dict[str, str],
        args: Any,
        kwargs: Any,
        outputs: Sequence[Tensor],
        random_state: RandomState,
    ) -> "Replay":
        """Keep a call's inputs and outputs, cut off from its graph."""
        args, kwargs = tree_map(_detached, (_without_caches(args, kwargs)))
        detached = [output.detach() for output in outputs]
        return cls(
            rule,
            names,
            {attribute: rule.module.get_parameter(attribute) for attribute in names},
            {},
            args,
            kwargs,
            detached,
            random_state,
            [None] * len(detached),
            autocast_dtype(detached[0].device),
            (_versions((args, kwargs)), _versions(detached)),
        )

    def keep_parameters(self) -> "Replay":
        """Return the same with copies of all parameters, which do not stay whole.

        All processes must call it: they gather what modules within have given up.
        """
        module = self.rule.module
        with gathered_within(module):
            # Parameters, as PEFT registers parametrizations of them in each call.
            others: dict[str, Tensor] = {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in module.named_parameters(remove_duplicate=False)
            }
        parameters = {name: others.pop(name) for name in self.parameters}
        return replace(self, parameters=parameters, others=others)

    def gradients(self, split: ExampleSplit) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield each example's gradients of the module's parameters, with their names.

        Raises:
            RuntimeError: a repetition gave other outputs than the call, or the model
                has changed the call's inputs since.
        """
        if all(gradient is None for gradient in self.output_gradients):
            return
        if _versions((self.args, self.kwargs)) != self.versions[0]:
            raise RuntimeError(
                "a module that is run again must keep its inputs, but the model has "
                f"changed those of {self.rule} in place: pass per_example=False."
            )
        done = 0
        if _versions(self.outputs) == self.versions[1]:
            while done < split.size:
                gradients = self._alone(split, done)
                if gradients is None:
                    break
                yield gradients
                done += 1
        if done < split.size:
            yield from self._in_batch(split, done)

    def _alone(
        self, split: ExampleSplit, index: int
    ) -> list[tuple[str, Tensor]] | None:
        """Return gradients of a call with one example; None if it differs."""

        def share(x: Any) -> Any:
            return split.part(x, index) if isinstance(x, Tensor) else x

        args, kwargs, expected, gradients = tree_map(
            share, (self.args, self.kwargs, self.outputs, self.output_gradients)
        )
        with attempt():  # a module need not take a part of its inputs
            outputs, parameters, draws = self._call(args, kwargs)
            # Other random numbers need not show: a factor that is zero hides them.
            if not draws and self._agrees(outputs, expected):
                return self._backward(outputs, parameters, gradients)
        return None

    def _in_batch(
        self, split: ExampleSplit, start: int
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the gradients of examples from a repetition of the whole call."""
        outputs, parameters, _ = self._call(self.args, self.kwargs)
        unchanged = _versions(self.outputs) == self.versions[1]
        if unchanged and not self._agrees(outputs, self.outputs):
            raise RuntimeError(
                "a module must give the same outputs when it is run again, got others "
                f"from {self.rule}: freeze its parameters with requires_grad_(False), "
                "or pass per_example=False."
            )
        for index in range(start, split.size):
            masked = [
                None if g is None else split.mask(g, index)
                for g in self.output_gradients
            ]
            yield self._backward(outputs, parameters, masked, index + 1 < split.size)

    def _call(
        self, args: Any, kwargs: Any
    ) -> tuple[list[Tensor], dict[str, Tensor], bool]:
        """Call the module again.

        Returns:
            its outputs, the parameters it used, and whether it drew random numbers.
        """
        parameters = {
            attribute: self._copy_of(attribute) for attribute in self.parameters
        }
        device = next(iter(parameters.values())).device
        with (
            kept_random_state(self.random_state, device),
            torch.enable_grad(),
            torch.autocast(
                device.type,
                self.autocast,
                enabled=self.autocast is not None,
                cache_enabled=False,
            ),
        ):
            everything = {**self.others, **parameters}
            got = call_with(self.rule.module, everything, args, kwargs)
            elsewhere = self.random_state.of_others is not None
            draws = not self.random_state.same(random_state(device, elsewhere))
        return self.rule.outputs_of(got), parameters, draws

    def _copy_of(self, attribute: str) -> Tensor:
        """Return a parameter to differentiate by, with the hooks on its gradient."""
        copy = self.parameters[attribute].detach().requires_grad_()
        for hook in hooks_of(self.rule.module.get_parameter(attribute)):
            copy.register_hook(hook)
        return copy

    def _agrees(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Return whether the outputs that have a gradient are as expected."""
        return all(
            agree(_expand(output, wanted), wanted, "output")
            for output, wanted, gradient in zip(
                outputs, expected, self.output_gradients, strict=True
            )
            if gradient is not None
        )

    def _backward(
        self,
        outputs: Sequence[Tensor],
        parameters: dict[str, Tensor],
        output_gradients: Sequence[Tensor | None],
        keep_graph: bool = False,
    ) -> list[tuple[str, Tensor]]:
        """Return the parameters' gradients, given those of the outputs."""
        used = [
            (_expand(output, gradient), gradient)
            for output, gradient in zip(outputs, output_gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if not used:
            return []
        gradients = list[Tensor | None](
            torch.autograd.grad(
                [output for output, _ in used],
                list(parameters.values()),
                [gradient for _, gradient in used],
                retain_graph=keep_graph,
                allow_unused=True,
            )
        )
        named = zip(parameters, gradients, strict=True)
        return [(self.names[name], grad) for name, grad in named if grad is not None]


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _expand(x: Tensor, like: Tensor) -> Tensor:
    """An output that examples share, given to each of them."""
    if x.dim() < like.dim() and x.shape == like.shape[-x.dim() :]:
        return x.expand_as(like)
    if x.dim() and len(x) == 1 and x.shape[1:] == like.shape[1:]:
        return x.expand_as(like)
    return x


def _versions(x: Any) -> list[int]:
    """How often each tensor has been changed in place."""
    return [leaf._version for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _without_caches(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Leave out caches of keys and values, to which a repetition would add."""
    return (
        tuple(None if _is_cache(x) else x for x in args),
        {name: None if _is_cache(x) else x for name, x in kwargs.items()},
    )


def _is_cache(x: Any) -> bool:
    return hasattr(x, "get_seq_length")
