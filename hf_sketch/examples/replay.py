"""Per-example gradients of modules of any kind, by running them again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves, tree_map

from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import call_with
from hf_sketch.model.state import kept_random_state

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # some compute in float32
_LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Replay:
    """One call of a module, kept so that it can be run again for each example.

    Every example's share of the inputs is run alone. If that does not give its share of
    the outputs (dropout, examples that are not the leading dimension), the whole call
    is repeated with the random numbers that it had, and differentiated once an example.

    Args:
        module: that was called.
        path: its name, for errors.
        parameters: its attributes that train, dotted where they lie in a container.
        args: of the call.
        kwargs: of the call.
        outputs: the tensors it returned, in the order of `tensors_of`.
        random_state: of torch's CPU and the module's device when it was called.
        others: attributes for its other parameters, where it does not keep them.
    """

    module: nn.Module
    path: str
    parameters: dict[str, Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Sequence[Tensor]
    random_state: tuple[Tensor, ...]
    others: dict[str, Tensor]

    @classmethod
    def of_call(
        cls,
        module: nn.Module,
        path: str,
        parameters: dict[str, Tensor],
        args: Any,
        kwargs: Any,
        outputs: Sequence[Tensor],
        state: tuple[Tensor, ...],
        in_shards: bool = False,
    ) -> "Replay":
        """Keep a call's inputs and outputs, cut off from its graph.

        With `in_shards`, keep copies of the parameters, too.

        Raises:
            ValueError: the module holds a unit of FSDP2.
        """
        others: dict[str, Tensor] = {}
        if in_shards:
            within = [part for part in module.modules() if part is not module]
            if any(isinstance(part, FSDPModule) for part in within):
                raise ValueError(
                    "fully_shard must not be called within a module that is run again "
                    f"for each example, got {type(module).__name__} at {path!r}: call "
                    "it on the module, or on one around it, or pass per_example=False."
                )
            everything = module.named_parameters(remove_duplicate=False)
            others = {name: p.detach().clone() for name, p in everything}
            parameters = {name: others.pop(name) for name in parameters}
        args, kwargs = tree_map(_detached, (args, kwargs))
        detached = [output.detach() for output in outputs]
        return cls(module, path, parameters, args, kwargs, detached, state, others)

    def gradients(
        self, output_gradients: Sequence[Tensor | None], split: ExampleSplit
    ) -> Iterator[dict[str, Tensor]]:
        """Each example's gradients of the module's parameters, by attribute.

        Raises:
            RuntimeError: a repetition gave other outputs than the call.
        """
        for index in range(split.size):
            share = _part_of(split, index)
            gradients = self._run(
                tree_map(share, self.args),
                tree_map(share, self.kwargs),
                [share(output) for output in self.outputs],
                [None if g is None else share(g) for g in output_gradients],
            )
            if gradients is None:
                yield from self._whole_gradients(output_gradients, split, index)
                return
            yield gradients

    def _whole_gradients(
        self,
        output_gradients: Sequence[Tensor | None],
        split: ExampleSplit,
        first: int,
    ) -> Iterator[dict[str, Tensor]]:
        """The same for the examples from `first` on, by repetitions of the call."""
        for index in range(first, split.size):
            masked = [
                None if g is None else split.mask(g, index) for g in output_gradients
            ]
            gradients = self._run(self.args, self.kwargs, self.outputs, masked)
            if gradients is None:
                raise RuntimeError(
                    "a module must give the same outputs when it is run again, got "
                    f"others from {type(self.module).__name__} at {self.path!r}: "
                    "freeze its parameters with requires_grad_(False), or pass "
                    "per_example=False."
                )
            yield gradients

    def _run(
        self,
        args: Any,
        kwargs: Any,
        expected: Sequence[Tensor],
        output_gradients: Sequence[Tensor | None],
    ) -> dict[str, Tensor] | None:
        """Gradients of a repetition, or None if its outputs are not as expected."""
        parameters = {
            n: p.detach().requires_grad_() for n, p in self.parameters.items()
        }
        device = next(iter(parameters.values())).device
        with kept_random_state(self.random_state, device), torch.enable_grad():
            everything = {**self.others, **parameters}
            outputs = call_with(self.module, everything, args, kwargs)
        outputs = [
            _expand(output, wanted)
            for output, wanted in zip(tensors_of(outputs), expected, strict=True)
        ]
        pairs = zip(outputs, expected, strict=True)
        if not all(_agree(output, wanted) for output, wanted in pairs):
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


def _part_of(split: ExampleSplit, index: int) -> Callable[[Any], Any]:
    """A function that gives an example's share of a tensor, and all else unchanged."""
    return lambda x: split.part(x, index) if isinstance(x, Tensor) else x


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _expand(x: Tensor, like: Tensor) -> Tensor:
    """An output that examples share, given to each of them."""
    if x.dim() < like.dim() and x.shape == like.shape[-x.dim() :]:
        return x.expand_as(like)
    if x.dim() and len(x) == 1 and x.shape[1:] == like.shape[1:]:
        return x.expand_as(like)
    return x


def _agree(got: Tensor, expected: Tensor) -> bool:
    """Whether two runs gave the same up to rounding."""
    if got.shape != expected.shape:
        return False
    tolerance = _TOLERANCE.get(got.dtype, _LOW_PRECISION_TOLERANCE)
    distance = torch.linalg.vector_norm((got.detach() - expected).to(torch.float32))
    norm = torch.linalg.vector_norm(expected.to(torch.float32))
    return bool(distance <= tolerance * norm)
