"""What sketching a batch reads and holds, counted from shapes alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches import QK, Grouped, Sketch

_SUM_BYTES: Final = 4  # rows are summed in float32


@dataclass(frozen=True)
class BatchShape:
    """A batch of one device.

    Args:
        examples: number of examples.
        tokens: tokens per example.
        element_bytes: bytes per number that the model computes with.
    """

    examples: int
    tokens: int
    element_bytes: int


@dataclass(frozen=True)
class BatchCost:
    """What the rows of a batch's examples take.

    Args:
        numbers: numbers that the map is applied to: each layer's inputs and output
            gradients where both are folded, else each example's gradient.
        held_bytes: memory on top of training's when the backward pass begins, at most:
            rows, what folds an embedding's ids, the folded and rotated sides of one
            layer and, in 16 bits, a float32 copy of the widest layer's gradient.
            Layers' inputs are those that training keeps; under autocast they are
            folded instead, and are not counted.
        uncounted: paths of modules that are not in these figures.
    """

    numbers: int
    held_bytes: int
    uncounted: tuple[str, ...] = ()


def batch_cost(model: nn.Module, sketch: ModelSketch, batch: BatchShape) -> BatchCost:
    """Count numbers and bytes; each module is taken to be called once."""
    numbers = widest = folding = 0
    held = batch.examples * sketch.row_size * _SUM_BYTES
    uncounted: list[str] = []
    for path, module, name, shape in _parameters(model, sketch):
        if len(shape) > 2:
            uncounted.append(path)
            continue
        looked_up = isinstance(module, nn.Embedding)
        tokens = batch.examples * batch.tokens
        sides = shape[1:] if looked_up else shape
        operator = sketch.operators.get(name)
        folded = folded_sides(operator)
        if len(shape) == 2 and not looked_up:
            widest = max(widest, tokens * max(shape))
        if len(shape) == 1 or folded:
            numbers += tokens * sum(sides)
        else:
            numbers += batch.examples * math.prod(shape)
        if folded and looked_up:
            factored = isinstance(operator, QK)  # else by signs alone
            held += shape[0] * (folded[0] if factored else 1) * _SUM_BYTES
        if isinstance(operator, Grouped):
            folding = max(folding, tokens * operator.numbers_per_product)
    held += folding * _SUM_BYTES
    if batch.element_bytes < _SUM_BYTES:
        held += widest * _SUM_BYTES
    return BatchCost(numbers, held, tuple(uncounted))


def folded_sides(operator: Sketch | None) -> tuple[int, ...]:
    """To what length a matrix's sides are folded apart; empty if they are not."""
    if isinstance(operator, Grouped):
        return operator.widths
    return operator.out_factors if isinstance(operator, QK) else ()


def _parameters(
    model: nn.Module, sketch: ModelSketch
) -> Iterator[tuple[str, nn.Module, str, torch.Size]]:
    """Each use of a parameter that trains: path, module, name in the map, shape."""
    names = {id(p): name for name, p in sketch.parameters_of(model).items()}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                yield path, module, names[id(parameter)], parameter.shape
