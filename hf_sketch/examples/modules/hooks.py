"""Hooks that read each example's gradients off a model's modules."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_sketch.examples.batch import Batch, Holding
from hf_sketch.examples.replay import Replay
from hf_sketch.examples.rules.base import Call, NoRule, Rule, tensors_of
from hf_sketch.examples.split import ExampleSplit, Packed
from hf_sketch.model.fsdp import gathered_within
from hf_sketch.model.state import RandomState, draws_elsewhere, random_state
from hf_sketch.sketches.outer import Routed


def watch_module(
    rule: Rule, current: Callable[[], Batch | None], in_shards: bool
) -> list[Callable[[], object]]:
    """Put hooks on a module, and return what takes them off.

    `current` gives the batch that is recorded, if any.
    """

    def before(module: nn.Module, args: Any) -> None:
        batch = current()
        if batch is not None and module.training and torch.is_grad_enabled():
            device = next(module.parameters()).device
            batch.random_states[rule.path] = random_state(device, elsewhere)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        batch = current()
        if batch is None:
            return None
        gathers = in_shards and rule.runs_again
        # Also if memory ran out before, since other processes gather.
        with gathered_within(module) if gathers else nullcontext():
            if batch.failure is not None:
                return None
            batch.seen.add(rule.path)
            if not any(x.requires_grad for x in tensors_of(output)):
                return None
            batch.called.add(rule.path)
            with Holding(batch, rule):
                return _watch(rule, batch, args, kwargs, output)
        return None

    elsewhere = isinstance(rule, NoRule) and draws_elsewhere(rule.module)
    # Before the hook by which FSDP2 gives up the parameters of this very module.
    register = rule.module.register_forward_hook
    undo = [*rule.open(current)]
    undo.append(register(after, with_kwargs=True, prepend=in_shards).remove)
    if isinstance(rule, NoRule) or not _is_torchs(rule.module):
        undo.append(rule.module.register_forward_pre_hook(before).remove)
    return undo


def _is_torchs(module: nn.Module) -> bool:
    """Return whether the module's forward pass is one of torch.nn."""
    return str(type(module).forward.__module__).startswith("torch.nn.")


def _watch(rule: Rule, batch: Batch, args: Any, kwargs: Any, output: Any) -> Any:
    """Read the gradients of a call's outputs, by which each example gets its own.

    An output that all examples share is given to each of them, if the rule may.
    """
    shared = rule.expands and _is_shared(rule, batch, output)
    if shared:
        batch.expanded.append(rule)
        if output.dim() == 0 or len(output) != 1:
            output = output.unsqueeze(0)
        output = output.expand(batch.split.size, *output.shape[1:])
    several = (
        not isinstance(output, Tensor)
        and not rule.is_model(output)
        and len(tensors_of(output)) > 1
    )
    if several:  # the gradient of one must not hold that of another
        output = tree_map(_alias, output)
    outputs = rule.outputs_of(output)
    trained = [x for x in outputs if x.requires_grad]
    if not any(batch.split.within(x) for x in trained):
        batch.unclear.append(rule)
        return None
    saved = None
    if rule.within or (len(outputs) == 1 and isinstance(output, Tensor)):
        of = batch.split, batch.sums, batch.shared
        call = Call(args, kwargs, outputs[0].detach(), *of)
        with torch.no_grad():
            saved = rule.forward(_shared_call(call) if shared else call)
    if saved is None:
        _watch_again(rule, batch, args, kwargs, outputs)
    else:
        for part, tensor in rule.watched(saved, outputs[0]):
            batch.watch(tensor, partial(_add, rule, batch, part), rule)
    return output if shared or several else None


def _watch_again(
    rule: Rule, batch: Batch, args: Any, kwargs: Any, outputs: list[Tensor]
) -> None:
    """Keep a call, to be run again for all that its module holds."""
    state = batch.random_states.get(rule.path)
    if state is None:
        state = random_state(outputs[0].device)
    replay_later(rule, _names(rule, batch), batch, args, kwargs, outputs, state)


def _shared_call(call: Call) -> Call:
    """Return the call as if each example had given the input that all share."""
    x = call.input if len(call.input) == 1 else call.input.unsqueeze(0)
    x = x.expand(call.split.size, *x.shape[1:])
    return dataclasses.replace(call, args=(x,), kwargs={})


def _add(rule: Rule, batch: Batch, saved: Any, gradient: Tensor) -> None:
    """Add what the rule makes of the gradient of the module's output."""
    for attribute, left, right in rule.backward(saved, gradient):
        name = rule.names.get(attribute)
        if name is None or name in batch.rescued:
            continue
        if right is not None and not isinstance(right, Routed):
            batch.sums.add_outer(name, left, right)
            continue
        assert isinstance(left, Tensor)
        if right is None:
            batch.sums.add(name, left.reshape(len(left), -1))
        else:
            batch.sums.add_routed(name, left, right)


def replay_later(
    rule: Rule,
    names: dict[str, str],
    batch: Batch,
    args: Any,
    kwargs: Any,
    outputs: list[Tensor],
    state: RandomState,
    rescues: bool = False,
) -> None:
    """Keep the call, to run it again when its outputs' gradients are there."""
    replay = Replay.of_call(rule, names, args, kwargs, outputs, state)
    if batch.copies_parameters:
        replay = replay.keep_parameters()
    if rescues:
        replay = dataclasses.replace(replay, rescues=True)
    batch.replays.append(replay)
    for place, tensor in enumerate(outputs):
        if not tensor.requires_grad:
            continue
        if batch.split.within(tensor) is None:
            batch.watch(tensor, partial(_refuse, rule, batch.split, tensor.shape), rule)
        else:
            batch.watch(tensor, partial(_keep, replay.output_gradients, place), rule)


def _names(rule: Rule, batch: Batch) -> dict[str, str]:
    """Return the names of the module's parameters, and of those that it borrowed."""
    prefix = f"{rule.path}." if rule.path else ""
    borrowed = {
        attribute: name
        for attribute, name in rule.borrowed.items()
        if prefix + attribute.rpartition(".")[0] not in batch.called
    }
    return rule.names | borrowed


def _is_shared(rule: Rule, batch: Batch, output: Any) -> bool:
    """Return whether all examples share one output, as of position embeddings."""
    if not isinstance(output, Tensor):
        return False
    size = batch.split.size
    if size == 1 or isinstance(batch.split, Packed):
        return False
    if not isinstance(rule.module, nn.Embedding):
        return output.shape[:1] == (1,)
    return len(output) == 1 or (output.dim() == 2 and len(output) != size)


def refusal(rule: Rule, split: ExampleSplit, shape: object) -> ValueError:
    """Return the error of a call whose outputs do not divide into the examples."""
    return ValueError(
        "the examples must lie along the first dimension of every output, of length "
        f"{split.size}, got {shape} from {rule}: pass per_example=False."
    )


def _refuse(rule: Rule, split: ExampleSplit, shape: torch.Size, _: Tensor) -> None:
    """Raise for a gradient that no example has for its own."""
    raise refusal(rule, split, tuple(shape))


def _alias(x: Any) -> Any:
    """Return the same numbers, with a gradient of their own."""
    return x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x


def _keep(gradients: list[Tensor | None], place: int, gradient: Tensor) -> None:
    """Note a gradient."""
    gradients[place] = gradient.detach()
