"""How good scores are, whatever made them: against retrained models and exact ones."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.sketches import CounterRandom


def random_subsets(
    count: int, rows: int, fraction: float = 0.5, seed: int = 0
) -> Tensor:
    """Random subsets of a training set, all of one size.

    Returns:
        (count, rows), bool, true for the rows in a subset.

    Raises:
        ValueError: `fraction` does not leave some rows in and some out.
    """
    size = round(fraction * rows)
    if not 0 < size < rows:
        raise ValueError(
            f"fraction must keep between 1 and {rows - 1} of {rows} rows, got "
            f"{fraction}: pass e.g. 0.5."
        )
    subsets = torch.zeros(count, rows, dtype=torch.bool)
    for number, subset in enumerate(subsets):
        order = CounterRandom(seed, f"subset/{number}").permutation(rows)
        subset[order[:size]] = True
    return subsets


def retrain_on_subsets(
    train: Callable[[Tensor, int], Tensor], subsets: Tensor, seeds: int = 1
) -> Tensor:
    """Each query's loss after training on each subset: the ground truth of scores.

    Args:
        train: trains a new model on the rows of these numbers with this seed, and
            gives each query's loss, (queries,).
        subsets: (subsets, rows), bool; see `random_subsets`.
        seeds: models trained on each subset, whose losses are averaged.

    Returns:
        (subsets, queries), float64.
    """
    losses: list[Tensor] = []
    for subset in tqdm(subsets, desc="Retraining", unit="subset"):
        rows = subset.nonzero().squeeze(1)
        runs = [train(rows, seed).double().cpu() for seed in range(seeds)]
        losses.append(torch.stack(runs).mean(0))
    return torch.stack(losses)


def linear_datamodeling_score(
    scores: Tensor, subsets: Tensor, losses: Tensor
) -> Tensor:
    """Rank correlation of what scores foretell of subsets with what came.

    A subset's rows should lower a query's loss by the sum of their scores.

    Shapes:
        scores (queries, rows), positive for proponents; subsets (subsets, rows), bool;
        losses (subsets, queries) -> (queries,), float64: Spearman's correlation over
        subsets, for which users report the mean

    Reference:
        Park et al. 2023, arXiv:2303.14186, definition 2.3.
    """
    foretold = scores.double() @ subsets.double().T
    return correlations(_ranks(foretold), _ranks(-losses.double().T))


def leave_one_out_correlation(scores: Tensor, changes: Tensor) -> Tensor:
    """Pearson's correlation with what leaving a row out did to each query's loss.

    Shapes:
        scores, changes (queries, rows) -> (queries,), float64; a change is the loss
        without the row minus the loss with it, positive for proponents
    """
    return correlations(scores, changes)


def score_correlation(scores: Tensor, exact: Tensor) -> float:
    """Pearson's correlation over all pairs of a query and a row: the paper's measure.

    Shapes:
        scores, exact (queries, rows)

    Reference:
        Schioppa 2024, arXiv:2402.03994, Sec. 5.1.
    """
    return float(correlations(scores.reshape(1, -1), exact.reshape(1, -1)))


def mislabel_auc(scores: Tensor, mislabelled: Tensor) -> float:
    """The probability that a mislabelled row scores above another; ties count half.

    Shapes:
        scores (rows,), e.g. self-influence; mislabelled (rows,), bool, of both kinds
    """
    positives = int(mislabelled.sum())
    if not 0 < positives < len(mislabelled):
        raise ValueError(
            f"some rows must be mislabelled and some not, got {positives} of "
            f"{len(mislabelled)}: pass true for the mislabelled ones."
        )
    ranks = _ranks(scores.double().unsqueeze(0)).squeeze(0)
    least = positives * (positives - 1) / 2
    pairs = positives * (len(scores) - positives)
    return (float(ranks[mislabelled].sum()) - least) / pairs


def correlations(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's correlation of each row with its counterpart, (n, m) twice -> (n,)."""
    left, right = left.double(), right.double()
    left = left - left.mean(1, keepdim=True)
    right = right - right.mean(1, keepdim=True)
    return (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1))


def _ranks(values: Tensor) -> Tensor:
    """Each row's ranks from 0, equal values sharing the mean of theirs."""
    ranks = torch.empty_like(values)
    for row, out in zip(values, ranks, strict=True):
        _, codes, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        out.copy_((last - (counts + 1) / 2)[codes])
    return ranks
