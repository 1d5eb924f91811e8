"""Orthonormal vectors in memory or in a file, and the products with all of them."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_sketch.curvature.operator import SymmetricOperator
from hf_sketch.curvature.vectors import norm_of

CHUNK_ELEMENTS = 2**26  # of the rows in use at a time


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal rows, used a chunk at a time: nothing else here is of their size.

    The chunks, and so the results' bits, are the same in memory and in a file. All
    products are of a matrix and a vector: these stay precise where a Trainer has
    lowered the precision of matrix products (TF32).

    Shapes:
        rows (count, size)

    Args:
        rows: on the operator's device, or mapped from a file.
        device: the operator's.
    """

    rows: Tensor
    device: torch.device

    @classmethod
    def empty(
        cls, count: int, operator: SymmetricOperator, file: Path | None = None
    ) -> "Basis":
        """Make room for `count` vectors of the operator, in memory or in a file.

        Raises:
            OSError: the file cannot be made, or its disk has no room for it.
        """
        shape, dtype, device = (count, operator.size), operator.dtype, operator.device
        if file is None:
            return cls(torch.empty(shape, dtype=dtype, device=device), device)
        needed = count * operator.size * dtype.itemsize
        file.unlink(missing_ok=True)  # a mapping of an earlier run keeps its own
        file.touch()
        free = shutil.disk_usage(file.parent).free
        if free < needed:
            raise OSError(
                f"{file} needs room for {needed} bytes, got {free} free. Free disk "
                "space, pass another basis_file, or take fewer steps."
            )
        rows = torch.from_file(str(file), True, count * operator.size, dtype=dtype)
        return cls(rows.view(shape), device)

    def orthogonalise(self, count: int, vector: Tensor) -> float:
        """Remove the first `count` rows from a vector, in place, twice.

        Classical Gram-Schmidt within a chunk, modified from chunk to chunk.

        Returns:
            the coefficient of the last of these rows; 0 if there are none.

        Reference:
            Giraud, Langou, Rozloznik, van den Eshof 2005, "Rounding error analysis of
            the classical Gram-Schmidt orthogonalization process": twice is enough.
        """
        return self._remove(count, vector) + self._remove(count, vector)

    def products(self, vector: Tensor) -> Tensor:
        """Return the inner products of a vector, (size,), with all rows: (count,)."""
        vector = vector.to(self.rows.dtype).to(self.device)
        chunks = self._chunks(len(self.rows))
        return torch.cat([torch.mv(part, vector) for _, part in chunks])

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return weighted sums of all rows.

        Shapes:
            coefficients (k, count) -> (k, size)
        """
        coefficients = coefficients.to(self.rows.dtype).to(self.device)
        sums = coefficients.new_zeros(len(coefficients), self.rows.shape[1])
        for start, part in self._chunks(len(self.rows)):
            for total, row in zip(sums, coefficients, strict=True):
                total.addmv_(part.T, row[start : start + len(part)])
        return sums

    def loss_of_orthogonality(self) -> float:
        """Return the greatest element of |V V^T - 1|."""
        count = len(self.rows)
        worst = self.rows.new_zeros((), device=self.device)
        for start, part in self._chunks(count):
            for index in range(start, count):
                before = part[: index + 1 - start]
                inner = torch.mv(before, self.rows[index].to(self.device))
                if index < start + len(part):
                    inner[-1] = norm_of([part[index - start]]) ** 2 - 1
                worst = torch.maximum(worst, inner.abs().max())
        return float(worst)

    def _remove(self, count: int, vector: Tensor) -> float:
        inner = vector.new_zeros(1)
        for _, part in self._chunks(count):
            inner = torch.mv(part, vector)
            vector.addmv_(part.T, inner, alpha=-1)
        return float(inner[-1])

    def _chunks(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the chunks of the first `count` rows, and where they start."""
        step = max(1, CHUNK_ELEMENTS // self.rows.shape[1])
        for start in range(0, count, step):
            yield start, self.rows[start : min(start + step, count)].to(self.device)
