"""Hooks that read each example's gradients off a model's modules."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from hf_sketch.examples.replay import Replay, tensors_of
from hf_sketch.examples.rules import Backward, Call, Rule, rule_for
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.examples.sums import GradientSums
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.state import random_state

_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


@dataclass
class Batch:
    """A batch between its forward pass and the reading of its rows.

    Args:
        inputs: what the model was called with.
        split: its examples.
        sums: where contributions go.
        outputs: watched tensors, or None if they are not to be kept.
        failure: what went wrong in a hook, in words: the error itself would keep the
            graph that it comes from. Nothing more is read then, and training does not
            hear of it.
    """

    inputs: Mapping[str, Any]
    split: ExampleSplit
    sums: GradientSums
    outputs: list[Tensor] | None = None
    failure: str | None = None
    called: set[str] = field(default_factory=set[str])
    replays: list[tuple["Watched", Replay, list[Tensor | None]]] = field(
        default_factory=list[Any]
    )

    def watch(self, tensor: Tensor, read: Callable[[Tensor], None]) -> None:
        """Call `read` with the tensor's gradient, once, and let go of it then."""
        readers = [read]

        def hook(gradient: Tensor) -> None:
            while readers:
                reader = readers.pop()
                with self.holding_failures(), torch.no_grad():
                    if self.failure is None:
                        reader(gradient)

        tensor.register_hook(hook)
        if self.outputs is not None:
            self.outputs.append(tensor)

    @contextmanager
    def holding_failures(self) -> Generator[None]:
        """Note it if the memory runs out within."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.failure = str(error)

    def finish(self) -> None:
        """Add what is computed after the backward pass.

        Raises:
            MemoryError: the memory ran out in a hook.
        """
        if self.failure is not None:
            raise MemoryError(
                "the gradients of the examples did not fit into memory "
                f"({self.failure}): pass layout='factored', a smaller out_size or "
                "per_device_train_batch_size, or per_example=False."
            )
        for watched, replay, gradients in self.replays:
            if all(gradient is None for gradient in gradients):
                continue
            examples = replay.gradients(gradients, self.split)
            for index, parts in enumerate(examples):
                for attribute, gradient in parts.items():
                    name = watched.names[attribute]
                    self.sums.add_example(name, index, gradient)
        self.replays = []


@dataclass
class Watched:
    """A module with trainable parameters of its own.

    Args:
        module: the module.
        path: its name in the model.
        names: the sketch's names of its parameters, and of those within it.
        rule: how its gradients are read, or None: by running it again.
        in_shards: whether its parameters are whole while it runs only (FSDP2).
    """

    module: nn.Module
    path: str
    names: dict[str, str]
    rule: Rule | None
    in_shards: bool = False
    learned: dict[str, Any] = field(default_factory=dict[str, Any])
    random_state: tuple[Tensor, ...] = ()

    def register(self, current: Callable[[], Batch | None]) -> list[RemovableHandle]:
        """Put the hooks on; `current` gives the batch that is recorded, if any."""

        def before(module: nn.Module, args: Any) -> None:
            if current() is not None and module.training and torch.is_grad_enabled():
                device = next(module.parameters()).device
                self.random_state = random_state(device)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            batch = current()
            if batch is None or batch.failure is not None:
                return None
            if not any(x.requires_grad for x in tensors_of(output)):
                return None
            batch.called.add(self.path)
            with batch.holding_failures():
                return self._watch(batch, args, kwargs, output)
            return None

        # Before the hook by which FSDP2 gives up the parameters of this very module.
        register = self.module.register_forward_hook
        handles = [register(after, with_kwargs=True, prepend=self.in_shards)]
        if self.rule is None:
            handles.append(self.module.register_forward_pre_hook(before))
        return handles

    def _watch(self, batch: Batch, args: Any, kwargs: Any, output: Any) -> Any:
        """Read the output's gradient; give every example its own output first."""
        shared = isinstance(output, Tensor) and self._is_shared(batch, args, output)
        if shared:
            if output.dim() == 0 or len(output) != 1:
                output = output.unsqueeze(0)
            output = output.expand(batch.split.size, *output.shape[1:])
        several = len(tensors_of(output)) > 1
        if several:  # the gradient of one must not hold that of another
            output = tree_map(_alias, output)
        self._check_divides(batch, output)
        backward = self._backward(batch, args, kwargs, output, shared)
        if backward is None:
            self._replay_later(batch, args, kwargs, output)
        else:
            self._add_later(batch, output, backward)
        return output if shared or several else None

    def _backward(
        self, batch: Batch, args: Any, kwargs: Any, output: Any, shared: bool
    ) -> Backward | None:
        """What the module's rule makes of its call, if it applies."""
        if self.rule is None or not isinstance(output, Tensor):
            return None
        if shared:
            first = (*args, *kwargs.values())[0]
            first = first if len(first) == 1 else first.unsqueeze(0)
            args, kwargs = (first.expand(len(output), *first.shape[1:]),), {}

        def fold(attribute: str, factor: Tensor, side: int) -> Tensor:
            name = self.names.get(attribute)
            return factor if name is None else batch.sums.fold(name, factor, side)

        call = Call(
            self.module, args, output.detach(), batch.split, kwargs, fold, self.learned
        )
        with torch.no_grad():
            return self.rule(call)

    def _add_later(self, batch: Batch, output: Tensor, backward: Backward) -> None:
        """Add the rule's contributions when the output's gradient is there."""

        def add(gradient: Tensor) -> None:
            for contribution in backward(gradient):
                name = self.names.get(contribution.attribute)
                if name is not None:
                    batch.sums.add(name, contribution)

        batch.watch(output, add)

    def _replay_later(self, batch: Batch, args: Any, kwargs: Any, output: Any) -> None:
        """Keep the call, to run it again when its outputs' gradients are there."""
        outputs = tensors_of(output)
        gradients: list[Tensor | None] = [None] * len(outputs)
        state = self.random_state or random_state(outputs[0].device)
        parameters = self._own_parameters(batch)
        replay = Replay.of_call(
            self.module,
            self.path,
            parameters,
            args,
            kwargs,
            outputs,
            state,
            self.in_shards,
        )
        batch.replays.append((self, replay, gradients))
        for place, tensor in enumerate(outputs):
            if tensor.requires_grad:
                batch.watch(tensor, _keep(gradients, place))

    def _own_parameters(self, batch: Batch) -> dict[str, Tensor]:
        """The module's parameters, and those of modules within that it did not call."""
        prefix = f"{self.path}." if self.path else ""
        return {
            attribute: self.module.get_parameter(attribute)
            for attribute in self.names
            if "." not in attribute
            or prefix + attribute.rpartition(".")[0] not in batch.called
        }

    def _is_shared(self, batch: Batch, args: Any, output: Tensor) -> bool:
        """Whether all examples share one output, as position embeddings are shared."""
        if batch.split.size == 1 or batch.split.starts:
            return False
        if not isinstance(self.module, nn.Embedding):
            return output.dim() > 0 and len(output) == 1
        return len(output) == 1 or (
            output.dim() == 2 and len(output) != batch.split.size
        )

    def _check_divides(self, batch: Batch, output: Any) -> None:
        """Raise unless the examples lie along the outputs' leading dimension."""
        for tensor in tensors_of(output):
            if tensor.requires_grad and batch.split.rows(tensor) is None:
                raise ValueError(
                    "the examples must lie along the first dimension of every output, "
                    f"of length {batch.split.size}, got {tuple(tensor.shape)} from "
                    f"{type(self.module).__name__} at {self.path!r}: pass "
                    "per_example=False."
                )


def watched_modules(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> list[Watched]:
    """Every module that owns a trainable parameter, with its rule.

    Parameters in a container count as those of the module that holds it.

    Raises:
        ValueError: a module's gradients depend on the whole batch.
    """
    known = {id(parameter): name for name, parameter in parameters.items()}
    in_shards = in_row_shards(parameters.values())
    found: list[Watched] = []
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            continue
        within = {
            attribute: known[id(parameter)]
            for attribute, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in known
        }
        own = {a: n for a, n in within.items() if _holds(module, a)}
        rule = rule_for(module)
        if own:
            names = own if rule else within
            found.append(Watched(module, path, names, rule, in_shards))
    return found


def _holds(module: nn.Module, attribute: str) -> bool:
    """Whether the module itself, or a container in it, holds the parameter."""
    holders = list(_modules_along(module, attribute))
    return all(isinstance(holder, _CONTAINERS) for holder in holders[1:])


def _modules_along(module: nn.Module, attribute: str) -> Iterator[nn.Module]:
    """The modules on the way to a parameter, from the outermost on."""
    yield module
    for part in attribute.split(".")[:-1]:
        module = module.get_submodule(part)
        yield module


def _alias(x: Any) -> Any:
    """The same numbers, with a gradient of their own."""
    return x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x


def _keep(gradients: list[Tensor | None], place: int) -> Callable[[Tensor], None]:
    """A hook that notes a gradient."""

    def keep(gradient: Tensor) -> None:
        gradients[place] = gradient.detach()

    return keep
