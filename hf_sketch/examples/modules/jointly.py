"""What is tried by all processes together, where parameters are in shards."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_sketch.examples.attempt import Attempt
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.modules.reading import Reading
from hf_sketch.examples.split import Rows
from hf_sketch.processes import of_each, of_process

logger = logging.getLogger(__name__)


def check_others(tried: Attempt, in_shards: bool) -> None:
    """Raise where an attempt failed in some processes only, in all of them.

    They would go on with other calls than the others, and wait for them forever.
    """
    if not in_shards:
        return
    if tried.error is not None:  # said at once: others may be amid an exchange
        logger.warning("A trial of the gradients' rules failed: %s", tried.error)
    errors = of_each(tried.error)
    reasons = [error for error in errors if error is not None]
    if 0 < len(reasons) < len(errors):
        raise failed_alone(reasons[0])


def failed_alone(reason: str) -> RuntimeError:
    """Return the error of a process that others would wait for."""
    return RuntimeError(
        "The gradients of modules could not be compared with those of single examples "
        f"in one of the processes: {reason}. Pass measure_error=False to train without "
        "the comparison."
    )


def calls_to_try(reading: Reading, call: ModelCall) -> list[tuple[ModelCall, bool]]:
    """Return calls, and whether they are needed.

    In shards there is one of each kind that some process makes, the same in all of
    them, and one with a single example, as an epoch's last batch may be.
    """
    if not reading.in_shards:
        return [(call, True)]
    device = next(iter(reading.parameters.values())).device
    kinds = of_each(call.situation)
    calls: list[ModelCall] = []
    for rank in sorted({kinds.index(kind) for kind in kinds}):
        given = _moved((call.args, call.kwargs), torch.device("cpu"))
        args, kwargs = _moved(of_process(rank, given), device)
        calls.append(ModelCall.of(reading.model, args, kwargs))
    several = [c for c in calls if isinstance(c.split, Rows) and c.split.size > 1]
    alone = [c.part(0, 1) for c in several]
    return [(c, True) for c in calls] + [(c, False) for c in alone]


def _moved(given: Any, device: torch.device) -> Any:
    """Return the same with all tensors on a device."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    return tree_map(moved, given)
