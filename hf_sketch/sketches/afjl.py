"""AFJL: signs, Hadamard, Gaussian, restrict."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sketch.sketches.blocked import MixedSketch
from hf_sketch.sketches.transforms.magnitudes import weigh_
from hf_sketch.sketches.variances.moments import of_kept_rows


@dataclass(frozen=True)
class AFJL(MixedSketch):
    """Signs, Hadamard, Gaussian diagonal; keep the first coordinates.

    AFFD without its second transform: sqrt(n / out_size) R G H1 B on a block of n
    elements. E|S x|^2 = |x|^2, but inner products of dense inputs have up to three
    times the variance of AFFD's (the more, the smaller out_size / n), and there are
    inputs for which it fails: the rows of H1 that are kept repeat the same signs on
    coordinates one leading stride apart, so that two of them cancel or double
    (tests/sketches/test_operator_limits.py). With mix="fft" the kept rows are
    neighbors, and coordinates near both ends of a block are kept with weights that
    vary with the seed.

    Args and errors are those of AFFD.

    Reference:
        Schioppa 2024, arXiv:2402.03994, eq. (7); blocks as for AFFD.
    """

    cut: ClassVar[bool] = True

    @property
    def mixed_shape(self) -> tuple[int, int]:
        """Only the kept coordinates are computed."""
        return 1, self.out_size

    def finish(self, mixed: Tensor) -> Tensor:
        """|G| and the scale."""
        return weigh_(mixed, self.seed, self.scale)

    @property
    def scale(self) -> float:
        """The product of sqrt(n / D) and 1 / sqrt(n)."""
        return self.out_size**-0.5

    @property
    def spread_variance(self) -> float:
        """A kept number is g^2 z^2, whose second moment is 9, not 3."""
        return 8 / self.out_size

    @property
    def cross_variance(self) -> float:
        """A kept number is g^2 z z', and E g^4 is 3."""
        own = 1 if self.in_size <= self.block else 0
        return 3 / self.out_size - own / self.block

    def square_variance(self, rows: Tensor) -> Tensor:
        x = self.moments(rows)
        weights = (6 * x.whole - 4 * x.fourth) / self.out_size
        return of_kept_rows(x, self.block, self.out_size) + weights

    def finish_adjoint(self, rows: Tensor) -> Tensor:
        return self.finish(rows.clone())
