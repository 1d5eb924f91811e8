"""Hooks that read each example's gradients off a model's modules."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.replay import Replay, tensors_of
from hf_sketch.examples.rules.base import Call, NoRule, Rule
from hf_sketch.examples.rules.by_module import rule_for
from hf_sketch.examples.split import Packed
from hf_sketch.model.state import random_state

_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


def rules_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Rule]:
    """Return the rule of every module that owns a trainable parameter.

    Parameters in a container count as those of the module that holds it.

    Raises:
        ValueError: a module's gradients depend on the whole batch.
    """
    known = {id(parameter): name for name, parameter in parameters.items()}
    found: list[Rule] = []
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            continue
        within = {
            attribute: known[id(parameter)]
            for attribute, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in known
        }
        own = {a: n for a, n in within.items() if _holds(module, a)}
        if own:
            rule = rule_for(module, path, own)
            if isinstance(rule, NoRule):  # is run again with the modules within it
                rule.names = within
            found.append(rule)
    return found


def watch_module(
    rule: Rule, current: Callable[[], Batch | None], in_shards: bool
) -> list[RemovableHandle]:
    """Put hooks on a module; `current` gives the batch that is recorded, if any."""

    def before(module: nn.Module, args: Any) -> None:
        batch = current()
        if batch is not None and module.training and torch.is_grad_enabled():
            device = next(module.parameters()).device
            batch.random_states[rule.path] = random_state(device)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        batch = current()
        if batch is None or batch.failure is not None:
            return None
        if not any(x.requires_grad for x in tensors_of(output)):
            return None
        batch.called.add(rule.path)
        with batch.holding_failures():
            return _watch(rule, batch, args, kwargs, output)
        return None

    # Before the hook by which FSDP2 gives up the parameters of this very module.
    register = rule.module.register_forward_hook
    handles = [register(after, with_kwargs=True, prepend=in_shards)]
    if isinstance(rule, NoRule):
        handles.append(rule.module.register_forward_pre_hook(before))
    return handles


def _watch(rule: Rule, batch: Batch, args: Any, kwargs: Any, output: Any) -> Any:
    """Read the output's gradient; give every example its own output first."""
    shared = isinstance(output, Tensor) and _is_shared(rule, batch, output)
    if shared:
        if output.dim() == 0 or len(output) != 1:
            output = output.unsqueeze(0)
        output = output.expand(batch.split.size, *output.shape[1:])
    outputs = tensors_of(output)
    several = len(outputs) > 1
    if several:  # the gradient of one must not hold that of another
        output = tree_map(_alias, output)
        outputs = tensors_of(output)
    _check_divides(rule, batch, outputs)
    saved = None
    if isinstance(output, Tensor):
        call = Call(args, kwargs, output.detach(), batch.split, batch.sums)
        with torch.no_grad():
            saved = rule.forward(_shared_call(call) if shared else call)
    if saved is None:
        _replay_later(rule, batch, args, kwargs, outputs)
    else:
        batch.watch(outputs[0], partial(_add, rule, batch, saved))
    return output if shared or several else None


def _shared_call(call: Call) -> Call:
    """Return the call as if each example had given the input that all share."""
    x = call.input if len(call.input) == 1 else call.input.unsqueeze(0)
    x = x.expand(call.split.size, *x.shape[1:])
    return dataclasses.replace(call, args=(x,), kwargs={})


def _add(rule: Rule, batch: Batch, saved: Any, gradient: Tensor) -> None:
    """Add what the rule makes of the gradient of the module's output."""
    for attribute, left, right in rule.backward(saved, gradient):
        name = rule.names.get(attribute)
        if name is None:
            continue
        if right is None:
            batch.sums.add(name, left.reshape(len(left), -1))
        else:
            batch.sums.add_outer(name, left, right)


def _replay_later(
    rule: Rule, batch: Batch, args: Any, kwargs: Any, outputs: list[Tensor]
) -> None:
    """Keep the call, to run it again when its outputs' gradients are there."""
    state = batch.random_states.get(rule.path) or random_state(outputs[0].device)
    parameters = _own_parameters(rule, batch)
    replay = Replay.of_call(rule, parameters, args, kwargs, outputs, state)
    if batch.in_shards:
        replay = replay.keep_parameters()
    batch.replays.append(replay)
    for place, tensor in enumerate(outputs):
        if tensor.requires_grad:
            batch.watch(tensor, partial(_keep, replay.output_gradients, place))


def _own_parameters(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """Return the module's parameters, and those of modules within it that it used."""
    prefix = f"{rule.path}." if rule.path else ""
    return {
        attribute: rule.module.get_parameter(attribute)
        for attribute in rule.names
        if "." not in attribute
        or prefix + attribute.rpartition(".")[0] not in batch.called
    }


def _is_shared(rule: Rule, batch: Batch, output: Tensor) -> bool:
    """Return whether all examples share one output, as of position embeddings."""
    if batch.split.size == 1 or isinstance(batch.split, Packed):
        return False
    if not isinstance(rule.module, nn.Embedding):
        return output.dim() > 0 and len(output) == 1
    return len(output) == 1 or (output.dim() == 2 and len(output) != batch.split.size)


def _check_divides(rule: Rule, batch: Batch, outputs: list[Tensor]) -> None:
    """Raise unless the examples lie along the outputs' leading dimension."""
    for tensor in outputs:
        if tensor.requires_grad and batch.split.within(tensor) is None:
            raise ValueError(
                "the examples must lie along the first dimension of every output, "
                f"of length {batch.split.size}, got {tuple(tensor.shape)} from {rule}: "
                "pass per_example=False."
            )


def _holds(module: nn.Module, attribute: str) -> bool:
    """Return whether the module itself, or a container in it, holds the parameter."""
    return all(isinstance(m, _CONTAINERS) for m in _modules_within(module, attribute))


def _modules_within(module: nn.Module, attribute: str) -> Iterator[nn.Module]:
    """Yield the modules on the way to a parameter, without the outermost."""
    for part in attribute.split(".")[:-1]:
        module = module.get_submodule(part)
        yield module


def _alias(x: Any) -> Any:
    """Return the same numbers, with a gradient of their own."""
    return x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x


def _keep(gradients: list[Tensor | None], place: int, gradient: Tensor) -> None:
    """Note a gradient."""
    gradients[place] = gradient.detach()
