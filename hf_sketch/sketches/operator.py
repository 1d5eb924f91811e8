"""The contract of every sketching operator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from hf_sketch.sketches.outer import form_outer
from hf_sketch.sketches.transforms.precision import exact


class Sketch(ABC):
    """A seeded linear map from R^in_size to R^out_size that nearly keeps angles.

    Every operator is a frozen dataclass of plain numbers: equal fields, equal matrix.
    Inputs may have any floating-point dtype; results have at least float32.

    Shapes:
        S @ x       (in_size,) -> (out_size,), or (in_size, b) -> (out_size, b)
        S.T @ y     the reverse
        rows @ S.T  (b, in_size) -> (b, out_size)
        rows @ S    (b, out_size) -> (b, in_size)

    Raises:
        ValueError: an argument's length does not fit.
        TypeError: an argument is not a floating-point tensor.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The matrix's shape: (out_size, in_size)."""

    @property
    def T(self) -> "Transposed":
        """The exact transpose."""
        return Transposed(self)

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, x: "Sketch") -> "Composed": ...

    def __matmul__(self, x: "Tensor | Sketch") -> "Tensor | Composed":
        if isinstance(x, Sketch):
            return Composed(self, x)
        return _on_columns(self.apply_rows, x, self.shape)

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        return _on_rows(self.adjoint_rows, rows, self.T.shape)

    @abstractmethod
    def apply_rows(self, rows: Tensor) -> Tensor:
        """Sketch each row.

        Shapes:
            rows (b, in_size) -> (b, out_size)
        """

    def apply_part(self, part: Tensor, start: int) -> Tensor:
        """Sketch some coordinates of each row, those from `start` on, zeros elsewhere.

        Rows of full length are built for it, unless the operator knows better.

        Shapes:
            part (b, length) -> (b, out_size)
        """
        after = self.shape[1] - start - part.shape[1]
        return self.apply_rows(torch.nn.functional.pad(part, (start, after)))

    @abstractmethod
    def adjoint_rows(self, rows: Tensor) -> Tensor:
        """Apply the transpose to each row.

        Shapes:
            rows (b, out_size) -> (b, in_size)
        """

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sketch sum_t left_t (x) right_t of each example, flattened row by row.

        This is the per-example gradient of a weight whose inputs are `right` and whose
        outputs have the gradients `left`; integer `left` stands for one-hot vectors
        (an embedding's token ids). The products are formed, unless the operator knows
        better.

        Shapes:
            left (b, t, m) or integer (b, t), right (b, t, n), m * n = in_size
            returns (b, out_size)
        """
        return self.apply_rows(form_outer(left, right, 0, self.shape[1]))

    @property
    def spread_variance(self) -> float:
        """The variance of |S x|^2 for a unit x that is spread over many blocks.

        It also holds between parts of a vector that operators of different streams
        sketch. By default that of a dense Gaussian matrix, 2 / out_size.
        """
        return 2 / self.shape[0]

    @property
    def cross_variance(self) -> float:
        """The variance of `<S x, S y>` for orthogonal unit x and y, on average over y.

        By default that of a dense Gaussian matrix, 1 / out_size.
        """
        return 1 / self.shape[0]

    def square_variance(self, rows: Tensor) -> Tensor:
        """Return the variance of |S x|^2 over the seeds, for each row x.

        By default that of a dense Gaussian matrix, 2 |x|^4 / out_size; docs/sketches.md
        derives each operator's.

        Shapes:
            rows (b, in_size) -> (b,), float64
        """
        return self.spread_variance * rows.double().square().sum(1).square()


@dataclass(frozen=True)
class SeededSketch(Sketch):
    """A sketch that is drawn from a seed.

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch, in [1, `largest_out_size`].
        seed: the only source of randomness; equal arguments, equal matrix.

    Raises:
        ValueError: a size is out of range.
    """

    in_size: int
    out_size: int
    seed: int

    def __post_init__(self) -> None:
        size, largest = self.in_size, self.largest_out_size
        if size < 1:
            raise ValueError(f"in_size must be at least 1, got {size}: pass 1 or more.")
        if not 1 <= self.out_size <= largest:
            raise ValueError(
                f"out_size must be in [1, {largest}] for in_size={size}, got "
                f"{self.out_size}: pass an out_size of at most {largest}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_size, self.in_size

    @property
    def largest_out_size(self) -> int:
        """The longest sketch: by default in_size, rounded up to a power of two."""
        return next_power_of_two(self.in_size)


@dataclass(frozen=True)
class Transposed:
    """The transpose of an operator, as `S.T` gives it."""

    sketch: Sketch

    @property
    def shape(self) -> tuple[int, int]:
        """The transposed matrix's shape: (in_size, out_size)."""
        out_size, in_size = self.sketch.shape
        return in_size, out_size

    @property
    def T(self) -> Sketch:
        """The operator itself."""
        return self.sketch

    def __matmul__(self, y: Tensor) -> Tensor:
        return _on_columns(self.sketch.adjoint_rows, y, self.shape)

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        return _on_rows(self.sketch.apply_rows, rows, self.sketch.shape)


@dataclass(frozen=True)
class Composed(Sketch):
    """Two operators one after the other, as `outer @ inner` gives it.

    Args:
        outer: applied last.
        inner: applied first; its out_size is outer's in_size.

    Raises:
        ValueError: the sizes do not meet.
    """

    outer: Sketch
    inner: Sketch

    def __post_init__(self) -> None:
        wanted, given = self.outer.shape[1], self.inner.shape[0]
        if wanted != given:
            raise ValueError(
                f"the inner operator must give {wanted} numbers, the outer's in_size, "
                f"got {given}: build the outer one with in_size={given}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.outer.shape[0], self.inner.shape[1]

    def apply_rows(self, rows: Tensor) -> Tensor:
        return self.outer.apply_rows(self.inner.apply_rows(rows))

    def adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.inner.adjoint_rows(self.outer.adjoint_rows(rows))

    def apply_outer(self, left: Tensor, right: Tensor) -> Tensor:
        return self.outer.apply_rows(self.inner.apply_outer(left, right))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def next_power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def fitting(elements: int) -> int:
    """Return how many items of `elements` numbers to work on at a time, at least 1.

    In float32 they fill 4 MiB, which stays in the cache between passes.
    """
    return max(1, 2**20 // max(1, elements))


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (low, high) of at most `step` that cover [0, size)."""
    for low in range(0, size, step):
        yield low, min(low + step, size)


def _on_columns(
    apply: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Apply a row operation to a vector or to the columns of a matrix."""
    if x.dim() == 1:
        return _on_rows(apply, x.unsqueeze(0), shape).squeeze(0)
    return _on_rows(apply, x.transpose(-1, -2), shape).transpose(-1, -2)


def _on_rows(
    apply: Callable[[Tensor], Tensor], rows: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Check a batch of rows, raise its dtype to that of the sums, and apply."""
    result_length, length = shape
    if not rows.is_floating_point():
        raise TypeError(
            f"a sketch takes a floating-point tensor, got {rows.dtype}: "
            "call .float() on it."
        )
    if rows.dim() != 2 or rows.shape[-1] != length:
        raise ValueError(
            f"the vectors must have {length} elements, got {rows.shape[-1]} "
            f"(a {rows.dim()}-dimensional argument): "
            "pass the vector that the operator's shape names."
        )
    rows = rows.to(accumulation_dtype(rows.dtype))
    return exact(apply)(rows) if len(rows) else rows.new_empty(0, result_length)
