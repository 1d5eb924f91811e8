"""Parameters that FSDP2 splits: a process's part, and calls of modules past it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_sketch.model.zero import in_partitions


def in_row_shards(parameters: Iterable[Tensor]) -> bool:
    """Whether all are split among the processes by their first dimension.

    So FSDP2 (`fully_shard`) splits them, with or without replicas of the shards.
    """
    return all(isinstance(p, DTensor) and _is_in_rows(p) for p in parameters)


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


def call_with(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a module with other parameters, those of its own that are given.

    Where hooks of FSDP2 or DeepSpeed would gather its own, it is called past them.
    """
    own = module.parameters(recurse=False)
    if isinstance(module, FSDPModule) or in_partitions(own):
        parameters = {f"module.{name}": p for name, p in parameters.items()}
        module = _Hookless(module)
    return torch.func.functional_call(
        module, dict(parameters), args, dict(kwargs), tie_weights=False
    )


class _Hookless(nn.Module):
    """Calls the forward of a module, and none of its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _is_in_rows(x: DTensor) -> bool:
    """Whether one axis of the mesh splits the first dimension and no other does any."""
    shards = [p for p in x.placements if not isinstance(p, Replicate)]
    return len(shards) == 1 and type(shards[0]) is Shard and shards[0].dim == 0
