"""Rows chosen by their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


def over_tasks(scores: Tensor, tasks: Sequence[str], how: str) -> Tensor:
    """The largest or the mean score over tasks, of the mean over a task's queries.

    Shapes:
        scores (queries, rows), tasks (queries) -> (rows,)
    """
    names = sorted(set(tasks))
    means = torch.stack(
        [scores[[task == name for task in tasks]].mean(0) for name in names]
    )
    return means.amax(0) if how == "max" else means.mean(0)


def best_rows(scores: Tensor, count: int) -> Tensor:
    """The rows of the greatest scores, best first; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count]


def diverse_rows(
    scores: Tensor, directions: Tensor, count: int, weight: float
) -> Tensor:
    """Places of rows that are good and unlike each other, in the order of choice.

    Each choice has the greatest (1 - weight) score - weight likeness, its likeness
    being the largest cosine with the rows chosen before it.

    Shapes:
        scores (n,), directions (n, out_size) at unit length -> (count,)

    Reference:
        Carbonell and Goldstein 1998, doi:10.1145/290941.291025 (maximal marginal
        relevance).
    """
    likeness = torch.full((len(scores),), -1.0)
    taken: list[int] = []
    for _ in range(count):
        marginal = (1 - weight) * scores - weight * likeness
        marginal[taken] = -torch.inf
        best = int(marginal.argmax())
        taken.append(best)
        likeness = torch.maximum(likeness, directions @ directions[best])
    return torch.tensor(taken)
