import numpy as np
import pytest
import torch
from scipy import stats

from hf_sketch.attribution.evaluation import (
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    random_subsets,
    retrain_on_subsets,
    score_correlation,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_subsets_have_their_size_and_follow_the_seed():
    subsets = random_subsets(20, 31, 0.4)
    assert subsets.sum(1).tolist() == [12] * 20
    assert torch.equal(subsets, random_subsets(20, 31, 0.4))
    assert not torch.equal(subsets, random_subsets(20, 31, 0.4, seed=1))
    assert len({tuple(subset.tolist()) for subset in subsets}) == 20
    with pytest.raises(ValueError, match=r"between 1 and 30 of 31 rows, got 1\.0"):
        random_subsets(2, 31, 1.0)


def test_the_datamodeling_score_is_spearmans_correlation_of_sums():
    scores, subsets = random(4, 30), random_subsets(12, 30)
    losses = random(12, 4, seed=1).round(decimals=1)  # with ties
    sums = scores.double().numpy() @ subsets.double().numpy().T
    expected = [
        stats.spearmanr(sums[q], -losses[:, q].numpy()).statistic for q in range(4)
    ]
    got = linear_datamodeling_score(scores, subsets, losses)
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_linear_model_of_the_losses_has_the_score_1():
    scores, subsets = random(3, 20), random_subsets(10, 20)

    def train(rows, seed):
        return 5.0 - scores[:, rows].sum(1) + seed

    losses = retrain_on_subsets(train, subsets, seeds=2)
    assert losses.shape == (10, 3)
    got = linear_datamodeling_score(scores, subsets, losses)
    assert got.tolist() == pytest.approx([1.0] * 3)
    expected = 5.5 - scores.double() @ subsets.double().T
    assert losses.T.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_correlations_are_pearsons():
    scores, exact = random(3, 15), random(3, 15, seed=1)
    rows = [stats.pearsonr(a, b).statistic for a, b in zip(scores, exact, strict=True)]
    assert leave_one_out_correlation(scores, exact).tolist() == pytest.approx(rows)
    whole = stats.pearsonr(scores.flatten(), exact.flatten()).statistic
    assert score_correlation(scores, exact) == pytest.approx(whole)


def test_the_auc_counts_pairs():
    scores = random(40).round(decimals=1)
    wrong = random(40, seed=1) > 0.5
    above = scores[wrong].unsqueeze(1) - scores[~wrong].unsqueeze(0)
    expected = np.mean((above.sign().numpy() + 1) / 2)
    assert mislabel_auc(scores, wrong) == pytest.approx(expected)
    with pytest.raises(ValueError, match="and some not, got 0 of 40: pass true"):
        mislabel_auc(scores, torch.zeros(40, dtype=torch.bool))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1.0, 2.0, 3.0, 4.0], 1.0), ([4.0, 3.0, 2.0, 1.0], 0.0), ([1.0] * 4, 0.5)],
)
def test_the_area_under_the_curve(scores, expected):
    positive = torch.tensor([False, False, True, True])
    assert mislabel_auc(torch.tensor(scores), positive) == expected
