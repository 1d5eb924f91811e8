"""Dense: a Gaussian matrix, drawn piece by piece."""

from dataclasses import dataclass

from torch import Tensor

from hf_sketch.sketches.operator import SeededSketch, fitting, spans
from hf_sketch.sketches.transforms.random import CounterRandom


@dataclass(frozen=True)
class Dense(SeededSketch):
    """A matrix of independent normal entries of variance 1 / out_size.

    The matrix is never held: pieces of 2**20 entries are drawn as they are needed, on
    every use. The yardstick for the others; slow.

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch, in [1, in_size].
        seed: the only source of randomness; equal arguments, equal matrix.
        stream: a name that gives independent entries under the same seed.

    Raises:
        ValueError: a size is out of range.

    Reference:
        Schioppa 2024, arXiv:2402.03994, section 3; the scale is ours.
    """

    stream: str = ""

    @property
    def largest_out_size(self) -> int:
        return self.in_size

    def apply_rows(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(rows), self.out_size)
        for low, high in spans(self.in_size, fitting(self.out_size)):
            total += rows[:, low:high] @ self._columns(low, high, rows)
        return total

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        result = rows.new_empty(len(rows), self.in_size)
        for low, high in spans(self.in_size, fitting(self.out_size)):
            result[:, low:high] = rows @ self._columns(low, high, rows).T
        return result

    def _columns(self, low: int, high: int, like: Tensor) -> Tensor:
        """Columns low, ..., high - 1 of the matrix, as rows."""
        rng = CounterRandom(self.seed, f"dense/{self.stream}")
        entries = rng.normals(low * self.out_size, (high - low) * self.out_size)
        return entries.view(high - low, self.out_size).to(like) * self.out_size**-0.5
