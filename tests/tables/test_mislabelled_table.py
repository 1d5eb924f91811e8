"""Wrong labels by gradients: the scores on small matrices, and a run."""

import pytest
import torch

from hf_sketch.recipes.tables.quality.mislabelled import (
    DAMPINGS,
    MislabelledArguments,
    State,
    auc_of,
    disagreement,
    run_mislabelled,
)


@pytest.mark.parametrize("damping", [0.1, 10.0])
@pytest.mark.parametrize("shape", [(12, 5), (4, 9)])
def test_disagreement_is_that_of_the_inverse_matrix(damping, shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    covariance = sum(torch.outer(u, u) for u in unit) / len(unit)
    damped = covariance + damping * covariance.trace() / shape[1] * torch.eye(shape[1])
    inverse = damped.inverse()
    expected = [
        -sum(u @ inverse @ v for j, v in enumerate(unit) if j != i) / len(unit)
        for i, u in enumerate(unit)
    ]
    assert torch.allclose(disagreement(rows, damping), torch.stack(expected))


def test_rows_that_point_the_other_way_are_found():
    generator = torch.Generator().manual_seed(1)
    wrong = torch.arange(40) < 4
    rows = torch.randn(40, 16, generator=generator)
    rows[:, 0] += torch.where(wrong, -5.0, 5.0)
    validation = torch.randn(6, 16, generator=generator)
    validation[:, 0] += 5
    states = [State(rows, torch.rand(40, generator=generator), validation)] * 2
    found = auc_of(states, wrong)
    assert len(found) == 3 + len(DAMPINGS)
    assert all(len(numbers) == 3 for numbers in found.values())
    for name in ("opponents of validation, cosine", *list(found)[3:]):
        assert found[name] == [1.0, 1.0, 1.0]
    assert max(found["loss"]) < 0.9
    assert max(found["self-influence"]) < 0.9


@pytest.mark.full
def test_the_table_runs_and_is_saved(tmp_path, capsys):
    results = run_mislabelled(MislabelledArguments(str(tmp_path), tiny=True))
    assert all(len(v) == 3 for v in list(results.values())[1:])
    assert "self-influence" in capsys.readouterr().out
