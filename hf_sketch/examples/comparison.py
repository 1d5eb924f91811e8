"""Whether a loss that is made outside the model compares examples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sketch.examples.attempt import RefusalError
from hf_sketch.examples.batch import Batch
from hf_sketch.model.gradient_hooks import unhooked

_LEAST = 1e-5  # of the second derivatives' norm; of a sum over examples it is zero


def check_comparison(
    loss: Tensor, calls: Sequence[Batch], owners: Sequence[int | None], name: str
) -> None:
    """Raise if the gradient of an example's outputs depends on another's outputs.

    In a loss that is a sum over examples, second derivatives by outputs of two of them
    are zero. The backward pass stops at the model's outputs.

    Args:
        loss: loss of the batch, with its graph.
        calls: the model's calls, with their answers.
        owners: the example of each row, of one call after another.
        name: name of the loss.

    Raises:
        RefusalError: it compares them.
    """
    answers = first_met(loss, [answer for call in calls for answer in call.answers])
    if not answers:
        return
    numbers = [number for call in calls for number in call.numbers]
    with unhooked([loss, *answers, *numbers]):
        _compare(loss, answers, calls, owners, name)


def _compare(
    loss: Tensor,
    answers: Sequence[Tensor],
    calls: Sequence[Batch],
    owners: Sequence[int | None],
    name: str,
) -> None:
    """As `check_comparison`, given the outputs that the loss is made of."""
    first: Any = torch.autograd.grad(
        loss, answers, create_graph=True, allow_unused=True
    )
    used = [
        (answer, gradient)
        for answer, gradient in zip(answers, first, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not used:
        return
    for side in _sides(owners):
        marks = _marks(calls, side)
        chosen = [gradient for _, gradient in used]
        probes = [marks[id(answer)] * _probe_of(answer) for answer, _ in used]
        second: Any = torch.autograd.grad(
            chosen, answers, probes, retain_graph=True, allow_unused=True
        )
        mixed, whole = 0.0, 0.0
        for answer, gradient in zip(answers, second, strict=True):
            if gradient is not None:
                squares = gradient.float().square().nan_to_num(0.0, 0.0)
                mixed += float(squares.where(marks[id(answer)] == 0, 0.0).sum())
                whole += float(squares.sum())
        if mixed > _LEAST**2 * whole:
            raise comparison_error(name)


def comparison_error(name: str) -> RefusalError:
    """Return the error of a loss that compares examples."""
    return RefusalError(
        "per-example gradients need a loss that is a sum over the examples of a batch, "
        f"but {name} compares them: train with a loss that gives each example its own, "
        "or pass per_example=False."
    )


def first_met(loss: Tensor, answers: Sequence[Tensor]) -> list[Tensor]:
    """Return the answers on which a loss depends other than through others of them.

    Those of inner layers lie before the last one's: derivatives by them would go back
    through the model.
    """
    ends = {answer.grad_fn for answer in answers}
    met = set[Any]()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in met:
            met.add(node)
            if node not in ends:
                left += [before for before, _ in node.next_functions]
    return [answer for answer in answers if answer.grad_fn in met]


def _sides(owners: Sequence[int | None]) -> list[list[bool]]:
    """Return ways to divide the rows in two, such that one divides any two examples."""
    numbers = [0 if owner is None else owner for owner in owners]
    bits = range(max(numbers).bit_length())
    return [[bool(number >> bit & 1) for number in numbers] for bit in bits]


def _marks(calls: Sequence[Batch], side: Sequence[bool]) -> dict[int, Tensor]:
    """Return ones in the place of the rows on one side, for each of the answers."""
    marks: dict[int, Tensor] = {}
    start = 0
    for call in calls:
        for answer in call.answers:
            mark = marks[id(answer)] = torch.zeros_like(answer, requires_grad=False)
            for index in range(call.split.size):
                if side[start + index]:
                    call.split.part(mark, index).fill_(1)
        start += call.split.size
    return marks


def _probe_of(answer: Tensor) -> Tensor:
    """Return fixed numbers of the answer's shape."""
    count = torch.arange(answer.numel(), device=answer.device, dtype=torch.float32)
    return (1.7 * count).cos().view(answer.shape).to(answer.dtype)
