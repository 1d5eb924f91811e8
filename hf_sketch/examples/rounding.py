"""How far numbers that should be equal may be apart."""

from typing import Literal

import torch
from torch import Tensor

# In float64 (of which some modules compute parts in float32), float32, and 16 bits.
_TOLERANCES = {
    "loss": (1e-6, 2e-5, 2e-2),  # of a batch, from its logits
    "rule": (1e-4, 1e-4, 5e-2),  # outputs, as a gradient rule foretells them
    "output": (1e-4, 1e-3, 5e-2),  # of a module that is run again for each example
    "row": (1e-4, 1e-3, 1e-1),  # sketch of an example's gradient, in its batch or alone
}


def tolerance(
    dtype: torch.dtype, of: Literal["loss", "rule", "output", "row"]
) -> float:
    """Return the largest relative distance that rounding explains."""
    place = {torch.float64: 0, torch.float32: 1}.get(dtype, 2)
    return _TOLERANCES[of][place]


def agree(got: Tensor, expected: Tensor, of: Literal["rule", "output"]) -> bool:
    """Return whether two outputs of a module are equal up to rounding."""
    if got.shape != expected.shape:
        return False
    distance = torch.linalg.vector_norm((got.detach() - expected).to(torch.float32))
    norm = torch.linalg.vector_norm(expected.to(torch.float32))
    return bool(distance <= tolerance(got.dtype, of) * norm)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which autocast computes now; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
