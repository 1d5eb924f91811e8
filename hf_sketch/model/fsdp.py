"""Parameters that FSDP2 splits: a process's part, and calls of modules past it."""

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_sketch.model.zero import gathered, in_partitions

_SHARDERS: Final = ("deepspeed.", "torch.distributed.")


def in_row_shards(parameters: Iterable[Tensor]) -> bool:
    """Whether all are split among the processes by their first dimension.

    So FSDP2 (`fully_shard`) splits them, with or without replicas of the shards.
    """
    return all(isinstance(p, DTensor) and _is_in_rows(p) for p in parameters)


def in_shards(parameters: Iterable[Tensor]) -> bool:
    """Return whether all are whole only while their module runs."""
    parameters = list(parameters)
    return in_row_shards(parameters) or in_partitions(parameters)


def check_whole(user: str, parameters: Iterable[Tensor]) -> None:
    """Raise if some parameters are split among processes, in whatever way.

    Raises:
        ValueError: some are.
    """
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            f"{user} needs whole parameters, got them in shards: load the checkpoint "
            "into a model that is not sharded."
        )


@contextmanager
def made_whole(parameters: Iterable[Tensor]) -> Generator[list[Tensor]]:
    """Yield each parameter in one piece, detached; all processes must enter it.

    Parameters that are whole already are not copied.
    """
    parameters = list(parameters)
    with gathered(parameters):
        own = [parameter.detach() for parameter in parameters]
        yield [x.full_tensor() if isinstance(x, DTensor) else x for x in own]


@contextmanager
def gathered_within(module: nn.Module) -> Generator[None]:
    """Within, all parameters of a module are as its calls see them, after such a call.

    All processes must enter it.
    """
    units = [
        part
        for part in module.modules()
        if isinstance(part, FSDPModule) and part is not module and _is_in_shards(part)
    ]
    with gathered(module.parameters()):
        try:
            for unit in units:
                unit.unshard()
            yield
        finally:
            for unit in units:
                unit.reshard()


def _is_in_shards(unit: nn.Module) -> bool:
    """Return whether the parameters of a unit of FSDP2, without units within, are."""
    within = [part for part in unit.modules() if part is not unit]
    units = [part for part in within if isinstance(part, FSDPModule)]
    others = {id(p) for part in units for p in part.parameters()}
    own = [p for p in unit.parameters() if id(p) not in others]
    return any(isinstance(parameter, DTensor) for parameter in own)


def own_part(x: Tensor) -> tuple[Tensor, int]:
    """The coordinates that this process answers for, and where they start.

    The parts of all processes are the whole, each coordinate once: of replicas of a
    shard the first answers for it, the others for none. A plain tensor is one part.

    Shapes:
        returns (length,), in the order of x's elements row by row

    Raises:
        ValueError: x is split otherwise than by its first dimension.
    """
    if not isinstance(x, DTensor):
        return x.reshape(-1), 0
    if not _is_in_rows(x):
        raise ValueError(
            "a tensor in shards must be split by its first dimension, as FSDP2 does, "
            f"got placements {x.placements}: shard it with fully_shard."
        )
    first = 0
    for axis, placement in enumerate(x.placements):
        rank = x.device_mesh.get_local_rank(axis)
        if isinstance(placement, Shard):
            rows_each = -(-x.shape[0] // x.device_mesh.size(axis))  # as torch.chunk
            first = min(rank * rows_each, x.shape[0])
        elif rank > 0:
            return torch.empty(0, dtype=x.dtype, device=x.device), 0
    return x.to_local().reshape(-1), first * math.prod(x.shape[1:])


def begin_again(model: nn.Module) -> None:
    """Make whole the parameters of a unit of FSDP2 that has begun a forward pass.

    Calls within that pass may have given them up.
    """
    if isinstance(model, FSDPModule):
        model.unshard()


class WholeParameters:
    """The tensors that stand for a model's parameters in the graphs of its calls.

    They are the parameters themselves but under FSDP2, which puts whole ones in their
    places while a module runs. Those of a module that does not run, as of a head whose
    weight a fused loss takes by itself, may stay in shards.

    Args:
        model: the model, not within a call.
        parameters: some of its parameters, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        split = {id(p): n for n, p in parameters.items() if isinstance(p, DTensor)}
        self._fixed = {n: p for n, p in parameters.items() if id(p) not in split}
        # Of each unit, where it has them, and their names.
        self._places: dict[nn.Module, list[tuple[str, str]]] = {}
        for unit in model.modules() if split else ():
            if isinstance(unit, FSDPModule):
                own = unit.named_parameters(remove_duplicate=False)
                named = [(path, split[id(p)]) for path, p in own if id(p) in split]
                self._places[unit] = named

    @contextmanager
    def noted(self) -> Generator[dict[str, Tensor]]:
        """Give them by name; those under FSDP2 come while the model is called."""
        whole = dict(self._fixed)

        def note(unit: nn.Module, *_: object) -> None:
            for path, name in self._places[unit]:
                x = unit.get_parameter(path)
                if not isinstance(x, DTensor):
                    whole.setdefault(name, x)

        with ExitStack() as hooks:
            for unit in self._places:  # before it gives them up again
                hooks.callback(unit.register_forward_hook(note, prepend=True).remove)
            yield whole
        for unit, places in self._places.items():
            for path, name in places:
                whole.setdefault(name, unit.get_parameter(path))


def call_with(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a module with other parameters, those of its own that are given.

    It is called past the hooks by which FSDP2 and DeepSpeed would gather the parameters
    of the module and of those within.
    """
    with without_shard_hooks(module):
        return torch.func.functional_call(
            module, dict(parameters), args, dict(kwargs), tie_weights=False
        )


@contextmanager
def without_shard_hooks(module: nn.Module, forward: bool = True) -> Generator[None]:
    """Within, no hook of FSDP2 or DeepSpeed runs in the backward pass of a module.

    DeepSpeed's reduce the gradients of a mixture of experts after it has run.

    Args:
        module: the module, with all modules within it.
        forward: whether their hooks on its forward pass are off, too. These gather and
            split its parameters.
    """
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for part in module.modules():
        own: Any = part  # no public way leads to hooks
        hooks = [own._backward_hooks, own._backward_pre_hooks]
        if forward:
            hooks += [own._forward_hooks, own._forward_pre_hooks]
        for registered in hooks:
            others = {k: h for k, h in registered.items() if not _is_of_shards(h)}
            if len(others) < len(registered):
                kept.append((registered, dict(registered)))
                registered.clear()
                registered.update(others)
    try:
        yield
    finally:
        for registered, earlier in kept:
            registered.clear()
            registered.update(earlier)


def _is_of_shards(hook: Any) -> bool:
    """Return whether FSDP2 or DeepSpeed registered a hook."""
    return str(getattr(hook, "__module__", "")).startswith(_SHARDERS)


def _is_in_rows(x: DTensor) -> bool:
    """Whether one axis of the mesh splits the first dimension and no other does any."""
    shards = [p for p in x.placements if not isinstance(p, Replicate)]
    return len(shards) == 1 and type(shards[0]) is Shard and shards[0].dim == 0
