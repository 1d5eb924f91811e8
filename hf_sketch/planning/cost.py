"""What sketching a batch takes: products, bytes moved, calls and memory."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeGuard

from torch import nn

from hf_sketch.examples.hooks import rules_of
from hf_sketch.examples.rules.base import NoRule, Rule
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import QK, Sketch
from hf_sketch.sketches.blocked import BlockedSketch
from hf_sketch.sketches.transforms.hadamard import kronecker_sizes

# How often an element is read or written, on a scale on which memory is as fast as for
# folding what no cache holds: as GPT-2 and Llama were measured on a processor.
_FOLD: Final = 4  # the side once, and its folded sum twice for each part of it
_BLOCKED: Final = 10  # formed, copied, flipped, two factors, flipped and added
_SUM: Final = 1
_NORM: Final = 2
_LAYER_NORM: Final = 5
_RMS_NORM: Final = 3
_RMS_NORM_AGAIN: Final = 9  # in 16 bits it is not told from its output
_LOOKED_UP: Final = 2
_CONVERT: Final = 2
_LOSS: Final = 5  # an exponential among them
_BATCH_CALLS: Final = 10  # as long take splitting the loss and taking the rows
_FORMED_CALLS: Final = 6  # more, as the blocks are gone through
_SMALL_FACTORS: Final = 2  # so much slower are products of 32 x 32 matrices
_SUMS_BYTES: Final = 4  # rows are summed in float32
_WORKING_BYTES: Final = 4 * 2**22  # pieces of blocks


@dataclass(frozen=True)
class BatchShape:
    """A batch of one device.

    Args:
        examples: in it.
        tokens: of an example.
        element_bytes: of a number that the model computes with.
    """

    examples: int
    tokens: int
    element_bytes: int

    @property
    def all_tokens(self) -> int:
        """Of all examples."""
        return self.examples * self.tokens


@dataclass(frozen=True)
class Work:
    """What is computed, and what memory it needs meanwhile; amounts add up.

    Args:
        flops: of matrix products.
        moved_bytes: read and written by all else.
        calls: of modules that are sketched.
        held_bytes: from the forward pass to the backward pass.
        summed_bytes: until all rows are made.
        converted_bytes: of the largest float32 copy of what a layer takes or gives, in
            a model of 16 bits; such copies come one after the other.
        uncounted: paths of modules whose work is not known.
    """

    flops: float = 0
    moved_bytes: float = 0
    calls: int = 0
    held_bytes: float = 0
    summed_bytes: float = 0
    converted_bytes: float = 0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.calls + other.calls,
            self.held_bytes + other.held_bytes,
            self.summed_bytes + other.summed_bytes,
            max(self.converted_bytes, other.converted_bytes),
            self.uncounted + other.uncounted,
        )

    def __mul__(self, times: float) -> "Work":
        """The same work a number of times, one after the other, in the same memory."""
        return Work(
            self.flops * times,
            self.moved_bytes * times,
            round(self.calls * times),
            self.held_bytes,
            self.summed_bytes,
            self.converted_bytes,
            self.uncounted,
        )


def example_work(model: nn.Module, sketch: ModelSketch, batch: BatchShape) -> Work:
    """The work of the rows of a batch's examples.

    Each module is taken to be called once. Modules without a rule are run again for
    each example: their work is that of training them.
    """
    parameters = sketch.parameters_of(model)
    shapes = dict(sketch.shapes)
    total = _rows_work(sketch, batch) + _loss_work(model, batch)
    for watched in rules_of(model, parameters):
        own = {a: shapes[n] for a, n in watched.names.items()}
        total += Work(calls=1)
        if isinstance(watched, NoRule):
            elements = sum(math.prod(shape) for shape in own.values())
            total += Work(6 * batch.all_tokens * elements, calls=batch.examples)
            continue
        for part in _parts(watched, own, sketch, batch):
            total += part
    return total


def step_work(sketch: ModelSketch, element_bytes: int, ranks: int = 1) -> Work:
    """The work of a step's row: each gradient is read, for its norm and its sketch.

    Args:
        sketch: the map.
        element_bytes: of a gradient's number.
        ranks: that hold a part of each parameter.
    """
    flops = moved = 0.0
    for name, shape in sketch.shapes:
        size = math.prod(shape)
        operator = sketch.operators.get(name)
        if is_factored(operator):
            folded = shape[0] * operator.out_factors[1]
            moved += _FOLD * _SUMS_BYTES * (size + folded)
        else:
            flops += size * _flops_an_element(operator or sketch.packed_operator)
            moved += _BLOCKED * _SUMS_BYTES * size
        moved += _NORM * element_bytes * size
        moved += _CONVERT * _SUMS_BYTES * size * (element_bytes < _SUMS_BYTES)
    calls = len(sketch.operators)
    return Work(flops / ranks, moved / ranks, calls)


def step_bytes(sketch: ModelSketch, element_bytes: int, ranks: int = 1) -> float:
    """The memory that a step's row needs: one parameter after the other is sketched."""
    most = 0.0
    for name, shape in sketch.shapes:
        converted = math.prod(shape) * (element_bytes < _SUMS_BYTES)
        operator = sketch.operators.get(name)
        folded = 0
        if is_factored(operator):
            folded = 2 * shape[0] * operator.out_factors[1]
        most = max(most, _SUMS_BYTES * (converted + folded))
    packed = sum(math.prod(s) for n, s in sketch.shapes if n in sketch.packed)
    working = most / ranks + _SUMS_BYTES * packed + _WORKING_BYTES
    return working + _SUMS_BYTES * sketch.out_size


def training_flops(model: nn.Module, batch: BatchShape) -> float:
    """Of a forward and a backward pass: 6 for a token and a weight that trains.

    4 for one that does not, none for looking up embeddings, and 12 for the width of
    each layer and each other token of the example, for attention.
    """
    flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            flops += (6 if parameter.requires_grad else 4) * parameter.numel()
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", 0)
    width = getattr(config, "hidden_size", 0)
    return batch.all_tokens * (flops + 12 * layers * width * batch.tokens)


def layer_elements(model: nn.Module) -> int:
    """Numbers that the layers with weights take and give for each token."""
    return sum(
        sum(parameter.shape)
        if parameter.dim() == 2
        else 2 * parameter.numel() * (name != "bias")
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
    )


def _rows_work(sketch: ModelSketch, batch: BatchShape) -> Work:
    """The sums over modules, and the parameters that share an operator."""
    rows = batch.examples * sketch.out_size * _SUMS_BYTES
    size = sum(math.prod(s) for n, s in sketch.shapes if n in sketch.packed)
    if not size:
        return Work(held_bytes=rows)
    packed = batch.examples * size
    return Work(
        packed * _flops_an_element(sketch.packed_operator),
        packed * (_BLOCKED + 4) * _SUMS_BYTES,
        held_bytes=rows,
        summed_bytes=2 * packed * _SUMS_BYTES,
    )


def _loss_work(model: nn.Module, batch: BatchShape) -> Work:
    """Each example's own loss: the logits are those of the last linear layer."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    width = heads[-1].out_features if heads else 0
    moved = _LOSS * batch.all_tokens * width * _SUMS_BYTES
    return Work(moved_bytes=moved, calls=_BATCH_CALLS)


def _parts(
    watched: Rule,
    shapes: Mapping[str, tuple[int, ...]],
    sketch: ModelSketch,
    batch: BatchShape,
) -> Iterator[Work]:
    """The work of each of a module's parameters, by its rule."""
    tokens, size = batch.all_tokens, batch.element_bytes
    looked_up = isinstance(watched.module, nn.Embedding)
    for attribute, shape in shapes.items():
        if len(shape) > 2:
            yield Work(uncounted=(watched.path,))
        elif len(shape) == 2:
            operator = sketch.operators.get(watched.names[attribute])
            if size < _SUMS_BYTES and not looked_up:
                copied = max(shape) if is_factored(operator) else sum(shape)
                yield Work(converted_bytes=tokens * copied * _SUMS_BYTES)
            if is_factored(operator):
                yield _factored_work(operator, shape, batch, watched.module)
            else:
                yield _formed_work(operator, shape, batch, looked_up)
        elif attribute == "weight":
            passes = _RMS_NORM if size >= _SUMS_BYTES else _RMS_NORM_AGAIN
            if isinstance(watched.module, nn.LayerNorm):
                passes = _LAYER_NORM
            yield Work(moved_bytes=passes * tokens * math.prod(shape) * size)
        else:
            yield Work(moved_bytes=_SUM * tokens * math.prod(shape) * size)


def _factored_work(
    operator: QK, shape: tuple[int, ...], batch: BatchShape, module: nn.Module
) -> Work:
    """Folding both sides, and the product of what is left of them."""
    tokens, size = batch.all_tokens, batch.element_bytes
    flops = 2.0 * tokens * operator.out_size
    moved = 2.0 * batch.examples * operator.out_size * _SUMS_BYTES
    input_side = 1 if isinstance(module, nn.Linear) else 0
    held = tokens * operator.out_factors[input_side] * _SUMS_BYTES
    sides = list(zip(shape, operator.out_factors, strict=True))
    if isinstance(module, nn.Embedding):
        (rows, width), *sides = sides
        held += rows * width * _SUMS_BYTES  # of which the tokens' are taken
        moved += (
            2 * tokens * width * _SUMS_BYTES + _LOOKED_UP * tokens * shape[1] * size
        )
    for side, width in sides:
        converted = _CONVERT * (size < _SUMS_BYTES)
        if side > 64 * width:
            flops += 2 * tokens * side * width
            moved += (converted * tokens * side) * _SUMS_BYTES
        else:
            moved += (_FOLD + converted) * tokens * side * _SUMS_BYTES
    return Work(flops, moved, held_bytes=held)


def _formed_work(
    operator: Sketch | None, shape: tuple[int, ...], batch: BatchShape, looked_up: bool
) -> Work:
    """Forming each example's gradient, and sketching it."""
    formed = batch.examples * math.prod(shape)
    flops = 0.0 if looked_up else 2.0 * batch.all_tokens * math.prod(shape)
    if operator is None:  # it is sketched with all that share an operator
        return Work(flops, 3 * formed * _SUMS_BYTES)
    flops += formed * _flops_an_element(operator)
    return Work(flops, _BLOCKED * formed * _SUMS_BYTES, calls=_FORMED_CALLS)


def is_factored(operator: Sketch | None) -> TypeGuard[QK]:
    """Whether a matrix's two sides are folded apart, as in the factored layout."""
    return isinstance(operator, QK) and bool(operator.in_factors)


def _flops_an_element(operator: Sketch) -> float:
    """Of a transform in blocks; of a dense map for all others."""
    if isinstance(operator, BlockedSketch):
        return 2.0 * _SMALL_FACTORS * sum(kronecker_sizes(operator.block))
    return 2.0 * operator.shape[0]
