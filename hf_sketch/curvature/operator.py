"""The operators that have spectra: symmetric maps, known by their products."""

from typing import Protocol

import torch
from torch import Tensor


class SymmetricOperator(Protocol):
    """A symmetric linear map of R^size; any object with these four things is one.

    Shapes:
        operator @ v  (size,) -> (size,), in the operator's dtype, on its device
    """

    @property
    def size(self) -> int:
        """The length of the vectors."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors, float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        ...

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


def product(operator: SymmetricOperator, vector: Tensor) -> Tensor:
    """Return operator @ vector, checked, in memory of its own.

    Raises:
        ValueError: the operator's sizes or dtypes contradict each other.
    """
    result = operator @ vector
    if result.shape != vector.shape or result.dtype != operator.dtype:
        raise ValueError(
            f"operator @ v must have shape {tuple(vector.shape)} and dtype "
            f"{operator.dtype}, got {tuple(result.shape)} and {result.dtype}. Return "
            "result.to(operator.dtype), of v's shape."
        )
    return result.detach().clone()


def check_dtype(operator: SymmetricOperator) -> None:
    """Raise unless the operator's numbers are fine enough to orthogonalise."""
    if operator.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "operator.dtype must be torch.float32 or torch.float64, got "
            f"{operator.dtype}. Take v in float32 and return (...).float()."
        )
