"""A few numbers that stand for all weights, and that updates add up in."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.random import CounterRandom
from hf_sketch.store.rows import BALANCE_SIZE


@dataclass(frozen=True)
class Balance:
    """A map from sketches of weights to 16 numbers, with random signs.

    It is linear, as sketches are: the balance after a step is the balance before it
    plus that of the step's update. So each row of a ledger can be checked by itself,
    and any change of a row shows: squared norms are kept in the mean.

    Shapes:
        of (..., row_size) -> (..., 16), float64

    Args:
        row_size: numbers of a sketch.
        seed: the sketch's.

    Example:
        >>> balance = Balance(row_size=64, seed=0)
        >>> before, update = torch.randn(2, 64).double()
        >>> after = balance.of(before) + balance.of(update)
        >>> torch.allclose(after, balance.of(before + update))
        True
    """

    row_size: int
    seed: int

    def of(self, sketches: Tensor) -> Tensor:
        """Return the balance of each sketch, in float64."""
        return sketches.double() @ self._signs.to(sketches.device)

    @cached_property
    def _signs(self) -> Tensor:
        words = CounterRandom(self.seed, role="balance").words(
            0, self.row_size * BALANCE_SIZE
        )
        signs = torch.where(words < 0, -1.0, 1.0).double() / BALANCE_SIZE**0.5
        return signs.view(self.row_size, BALANCE_SIZE)
