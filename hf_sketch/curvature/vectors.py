"""Vectors of parameter space, as one part per parameter."""

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

Parts = list[Tensor]
Vector = Mapping[str, Tensor]

_SUMMED: Final = 2**10  # squares summed at a time in the parts' own dtype


def norm_of(parts: Iterable[Tensor]) -> float:
    """Return the norm of all parts together.

    It is exact to about 1e-7: a plain float32 sum of a million squares is off by 2e-5.
    """
    norms = [norm for part in parts for norm in _norms(part.detach().reshape(-1))]
    return float(torch.cat(norms).to("cpu", torch.float64).norm())


def dot(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Return the inner product of two vectors."""
    pairs = zip(left, right, strict=True)
    products = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]
    return float(torch.stack(products).to(torch.float64).sum())


def _norms(flat: Tensor) -> tuple[Tensor, Tensor]:
    whole = len(flat) // _SUMMED * _SUMMED
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _SUMMED), dim=1)
    return norms, torch.linalg.vector_norm(flat[whole:]).view(1)
