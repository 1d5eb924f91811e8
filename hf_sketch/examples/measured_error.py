"""How far sketched inner products are from exact ones, measured on real examples."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_sketch.examples.attempt import attempt
from hf_sketch.examples.own_loss import own_part
from hf_sketch.examples.rounding import tolerance
from hf_sketch.examples.sketcher import ExampleLossFunction, ExampleSketcher
from hf_sketch.model.state import evaluation_mode

_HELD_BYTES = 2**28
_EXAMPLES_AT_ONCE = 2  # so that errors of batching still show
_TOP = 10
_LEAST_FOR_TOP = 2 * _TOP + 1  # of fewer, more than half would be found by chance


@dataclass(frozen=True)
class MeasuredError:
    """Inner products of sketched gradients beside exact ones, in evaluation mode.

    Args:
        examples: number of examples compared, each with each.
        pearson_r: correlation over the pairs of different examples; None for fewer than
            three pairs.
        relative_error: median over those pairs of |sketched - exact| divided by the
            product of the two exact norms; None without a pair.
        row_error: greatest relative distance of a row from the sketch of the gradient
            of its example alone, as batching and rounding cause.
        top_found: share of each example's exact top 10 others, by inner product, that
            is in its sketched top 10; None for fewer than 21 examples, of which chance
            would find more than half.
    """

    examples: int
    pearson_r: float | None
    relative_error: float | None
    row_error: float
    top_found: float | None = None

    def __str__(self) -> str:
        r = "-" if self.pearson_r is None else f"{self.pearson_r:.4f}"
        relative = "-" if self.relative_error is None else f"{self.relative_error:.2e}"
        share = self.top_found
        top = "" if share is None else f", {share:.0%} of the exact top {_TOP} found"
        return (
            f"Pearson r {r}, median relative error {relative} of inner products of "
            f"{self.examples} examples{top}; rows are off by {self.row_error:.1e}"
        )


def measure_error(
    sketcher: ExampleSketcher,
    batches: Sequence[Mapping[str, Any]],
    examples: int = 8,
    loss_fn: ExampleLossFunction | None = None,
    low_precision: bool = False,
) -> MeasuredError | None:
    """Compare rows with a backward pass per example, at the present weights.

    The model runs in evaluation mode; its gradients, its mode and all random numbers
    are left as they were. Exact gradients are held while they fit 256 MiB, and
    otherwise computed again for each pair.

    Args:
        sketcher: within its context, with no batch in flight.
        batches: inputs of the model.
        examples: number of examples compared: the first that have a loss.
        loss_fn: see `ExampleSketcher.sketch`.
        low_precision: the model computes in 16 bits.

    Returns:
        the comparison; None, with a warning, if it does not fit into memory.

    Raises:
        RuntimeError: a row is not the sketch of its example's gradient.
    """
    error, reason = None, None
    try:
        with (
            attempt() as tried,  # some models have no gradients in evaluation mode
            evaluation_mode(sketcher.model),
            sketcher.paused(),
        ):
            error = _measure(sketcher, batches, examples, loss_fn)
        reason = tried.error
    except (MemoryError, torch.OutOfMemoryError) as failure:
        reason = f"out of memory ({failure})"
    if error is None:
        warnings.warn(
            f"Rows were not compared with exact gradients: {reason}. They may still be "
            "right.",
            stacklevel=2,
        )
        return None
    parameter = next(iter(sketcher.parameters.values()))
    dtype = torch.float16 if low_precision else parameter.dtype
    if error.row_error > (largest := tolerance(dtype, "row")):
        raise RuntimeError(
            "a row must be the sketch of the gradient of its example alone within "
            f"{largest:g} of its norm, got {error.row_error:.3g}: pass "
            "per_example=False, and report the model's class, "
            f"{type(sketcher.model).__name__}."
        )
    return error


def top_found(exact: Tensor, products: Tensor, count: int) -> float:
    """Return the share of each row's exact top `count` others in its sketched top.

    Shapes:
        exact, products (n, n), of each with each
    """
    own = torch.eye(len(exact), dtype=torch.bool)
    wanted, got = (
        x.masked_fill(own, -torch.inf).topk(count).indices for x in (exact, products)
    )
    found = wanted.unsqueeze(2) == got.unsqueeze(1)
    return float(found.sum() / wanted.numel())


def _measure(
    sketcher: ExampleSketcher,
    batches: Sequence[Mapping[str, Any]],
    examples: int,
    loss_fn: ExampleLossFunction | None,
) -> MeasuredError:
    """Compare the first examples that have a loss."""
    rows: list[Tensor] = []
    gradients: list[Callable[[], list[Tensor]]] = []
    for inputs in _pieces(sketcher, batches):
        missing = examples - len(rows)
        if not missing:
            break
        got = sketcher.sketch(inputs, loss_fn)
        for index in (got.weights > 0).nonzero().flatten().tolist()[:missing]:
            rows.append(got.rows[index])
            gradients.append(_alone(sketcher, inputs, index, loss_fn))
    if not rows:
        return MeasuredError(0, None, None, 0.0)
    comparison = _Comparison(sketcher, torch.stack(rows), gradients)
    exact = comparison.exact_products()
    sketched = comparison.rows.to("cpu", torch.float64)
    return _errors(exact, sketched, comparison.row_error)


def _pieces(
    sketcher: ExampleSketcher, batches: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield a few examples at a time, to spare memory."""
    for inputs in batches:
        inputs = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
        yield from sketcher.split_of(inputs).pieces(inputs, _EXAMPLES_AT_ONCE)


def _alone(
    sketcher: ExampleSketcher,
    inputs: Mapping[str, Any],
    index: int,
    loss_fn: ExampleLossFunction | None,
) -> Callable[[], list[Tensor]]:
    """Return a function that computes one example's exact gradient by the model."""
    split = sketcher.split_of(inputs)
    own = {name: split.share(name, value, index) for name, value in inputs.items()}

    def gradient() -> list[Tensor]:
        with torch.enable_grad():
            output = sketcher.model(**own)
            if loss_fn is None:
                loss = own_part(sketcher.model, output, sketcher.penalised)
            else:
                loss = loss_fn(output, own).sum()
        parameters = list(sketcher.parameters.values())
        grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
        return list(grad(loss, parameters))

    return gradient


@dataclass
class _Comparison:
    """Rows beside the exact gradients they should be sketches of."""

    sketcher: ExampleSketcher
    rows: Tensor
    gradients: Sequence[Callable[[], list[Tensor]]]
    row_error: float = 0.0

    def exact_products(self) -> Tensor:
        """Return inner products of each with each: (n, n), float64, on the CPU."""
        count = len(self.gradients)
        products = torch.zeros(count, count, dtype=torch.float64)
        element = next(iter(self.sketcher.parameters.values())).element_size()
        each = element * self.sketcher.model_sketch.in_size
        held = max(1, _HELD_BYTES // each)
        for first in range(0, count, held):
            block: list[list[Tensor]] = []
            for index in range(first, count):
                gradient = self.gradients[index]()
                if first == 0:
                    self._compare(index, gradient)
                for place, other in enumerate([*block, gradient][: held + 1]):
                    column = index if place == len(block) else first + place
                    products[index, column] = _product(gradient, other)
                if len(block) < held:
                    block.append(gradient)
        return products.tril() + products.tril(-1).T

    def _compare(self, index: int, gradient: list[Tensor]) -> None:
        """Note how far a row is from the sketch of the gradient."""
        named = dict(zip(self.sketcher.parameters, gradient, strict=True))
        expected = self.sketcher.model_sketch.sketch(named)
        distance = torch.linalg.vector_norm(self.rows[index] - expected)
        norms = torch.linalg.vector_norm(self.rows, dim=1)
        # A gradient that all but vanishes has no direction to compare.
        norm = torch.linalg.vector_norm(expected).clamp(min=1e-3 * norms.max())
        if distance > 0:  # and not zero in place of a gradient that is zero
            self.row_error = max(self.row_error, float(distance / norm))


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product of two gradients."""
    pairs = zip(left, right, strict=True)
    return sum(float(torch.dot(a.flatten(), b.flatten())) for a, b in pairs)


def _errors(exact: Tensor, rows: Tensor, row_error: float) -> MeasuredError:
    """Return the figures, given exact inner products and sketches."""
    some = exact.diagonal() > 0  # where no parameter was reached, nothing can be off
    rows, exact = rows[some], exact[some][:, some]
    count = len(rows)
    pairs = torch.triu_indices(count, count, offset=1)
    products = rows @ rows.T
    got, wanted = (x[pairs[0], pairs[1]] for x in (products, exact))
    norms = exact.diagonal().sqrt()
    scale = torch.outer(norms, norms)[pairs[0], pairs[1]]
    relative = ((got - wanted) / scale).abs()
    r = float(torch.corrcoef(torch.stack([got, wanted]))[0, 1]) if count > 2 else None
    return MeasuredError(
        examples=count,
        pearson_r=r,
        relative_error=float(relative.median()) if count > 1 else None,
        row_error=row_error,
        top_found=top_found(exact, products, _TOP) if count >= _LEAST_FOR_TOP else None,
    )
