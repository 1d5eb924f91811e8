"""Wrong labels and copies, planted in the training rows of a task."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sketch import CounterRandom
from hf_sketch.recipes.tables.quality.audit_tasks import Examples, LabelTask

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Planted:
    """A training set with wrong labels and copies.

    Args:
        rows: the model's inputs.
        wrong: which labels are wrong, (rows,), bool.
        exact: pairs of a row and its copy, the lesser number first.
        near: pairs of a row and its near copy, likewise.
    """

    rows: Examples
    wrong: Tensor
    exact: Pairs
    near: Pairs


def planted_in(task: LabelTask, fraction: float, copies: int, seed: int) -> Planted:
    """Return a task's training rows with wrong labels in a part, and copies."""
    rows, wrong = wrong_labels(task, fraction, seed)
    return with_copies(task, rows, wrong, copies, seed)


def wrong_labels(
    task: LabelTask, fraction: float, seed: int
) -> tuple[Examples, Tensor]:
    """Give a random part of the training rows another label.

    Returns:
        the rows, and which of them are wrong: (rows,), bool.
    """
    count = len(task.train)
    chosen = CounterRandom(seed, "flipped-labels").permutation(count)
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[chosen[: round(fraction * count)]] = True
    words = CounterRandom(seed, "wrong-labels").words(0, count)
    shifts = (1 + words % (task.classes - 1)).tolist()
    rows = [
        {**row, "labels": (int(row["labels"]) + shift) % task.classes} if bad else row
        for row, shift, bad in zip(task.train, shifts, wrong.tolist(), strict=True)
    ]
    return rows, wrong


def with_copies(
    task: LabelTask, rows: Examples, wrong: Tensor, count: int, seed: int
) -> Planted:
    """Put copies of some rows, and near copies of others, in the place of more.

    None of these have wrong labels.

    Args:
        task: the data.
        rows: its training rows, some with wrong labels.
        wrong: which, (rows,), bool.
        count: number of exact copies, and of near ones.
        seed: seed of the choice.
    """
    order = CounterRandom(seed, "copies").permutation(len(rows))
    order = order[~wrong[order]].tolist()
    changed, pairs = list(rows), Pairs()
    while len(pairs) < 2 * count:
        source, place = order.pop(), order.pop()
        copy = rows[source]
        if len(pairs) >= count:
            copy = task.reworded(copy)
        if len(pairs) < count or copy is not rows[source]:
            changed[place] = copy
            pairs.append((min(source, place), max(source, place)))
    return Planted(changed, wrong, pairs[:count], pairs[count:])
