"""What losses would be without some examples, beside training without them."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_sketch import ModelSketch, sketch_dataset

EXAMPLES, WIDTH = 60, 4


class Line(torch.nn.Module):
    """A linear regression without a constant."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x, labels):
        answers = x @ self.weight
        return {"loss": (answers - labels).square().mean(), "answers": answers}


def squared(outputs, batch):
    return (outputs["answers"] - batch["labels"]).square().sum(1)


@pytest.fixture(scope="module")
def fitted():
    """A linear regression in its minimum: its data, its rows and rows of queries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, WIDTH, generator=generator)
    noise = 0.3 * torch.randn(EXAMPLES, 1, generator=generator)
    y = x @ torch.ones(WIDTH, 1) + noise
    model = Line(torch.linalg.lstsq(x, y).solution)
    sketch = ModelSketch.from_model(model, WIDTH, layout="blocked")
    data = Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()})
    data = data.with_format("torch")
    rows = sketch_dataset(model, data, sketch, loss_fn=squared)
    asked = sketch_dataset(model, data.select(range(5)), sketch, loss_fn=squared)
    return x, y, rows, asked


def retrained(x, y, removed):
    stay = [i for i in range(len(x)) if i not in removed]
    weight = torch.linalg.lstsq(x[stay], y[stay]).solution
    whole = torch.linalg.lstsq(x, y).solution
    return ((x @ weight - y).square() - (x @ whole - y).square()).squeeze(1)


def dense(rows, queries, removed):
    """The documented estimate and interval by whole matrices in float64."""
    r = torch.tensor(rows.dataset["sketch"][:], dtype=torch.float64)
    q = torch.tensor(queries.dataset["sketch"][:], dtype=torch.float64)
    q = torch.cat([q, q.mean(0, keepdim=True)])
    stay = [i for i in range(len(r)) if i not in removed]

    def solved(some):
        c = some.T @ some / len(some)
        return torch.linalg.solve(c + c.trace() / len(some) * torch.eye(len(c)), q.T)

    own = (r[removed] @ solved(r)).T / len(r)
    change = (r[removed] @ solved(r[stay])).sum(0) / len(stay)
    error = WIDTH**-0.5  # it was not measured
    of_sketch = error * solved(r).norm(dim=0) * r[removed].sum(0).norm() / len(r)
    parts = own.square().sum(1) + (change - own.sum(1)).square() + of_sketch.square()
    return change, 2 * parts.sqrt()


@pytest.mark.parametrize("removed", [[7], [3, 8, 40], list(range(20, 45))])
def test_the_estimate_and_its_interval_are_those_documented(fitted, removed):
    _, _, rows, queries = fitted
    found = rows.what_if(removed, queries)
    change, half = dense(rows, queries, removed)
    lines = found.queries
    assert torch.tensor(lines["change"][:]) == pytest.approx(change[:-1], rel=1e-4)
    high, low = torch.tensor(lines["high"][:]), torch.tensor(lines["low"][:])
    assert (high - low) / 2 == pytest.approx(half[:-1], rel=1e-4)
    assert (high + low) / 2 == pytest.approx(change[:-1], rel=1e-4)
    assert found.change == pytest.approx(float(change[-1]), rel=1e-4)
    assert found.high - found.low == pytest.approx(2 * float(half[-1]), rel=1e-4)
    assert found.removed == len(removed)
    assert found.examples == EXAMPLES


def test_signs_and_sizes_are_those_of_training_without_the_examples(fitted):
    x, y, rows, queries = fitted
    changes, truths = [], []
    for first in range(0, EXAMPLES, 6):
        removed = [*range(first, first + 6)]
        truths.append(float(retrained(x, y, removed)[:5].mean()))
        changes.append(rows.what_if(removed, queries).change)
    both = torch.tensor([changes, truths])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8


def test_examples_may_be_named_by_columns_and_seen_many_times(fitted):
    _, _, rows, queries = fitted
    noisy = rows.dataset.to_dict()
    noisy["sketch"] = [[-s for s in row] for row in noisy["sketch"]]
    again = Dataset.from_dict(noisy, features=rows.dataset.features)
    twice = replace(rows, dataset=concatenate_datasets([rows.dataset, again]))
    source = Dataset.from_dict(
        {"source": ["web" if i < 9 else "book" for i in range(60)]}
    )
    joined = twice.join(source, "source")
    by_name = joined.what_if({"source": "web"}, queries)
    assert by_name.removed == 9
    by_id = twice.what_if(range(9), queries)
    assert by_name.change == pytest.approx(by_id.change)
    assert by_name.high == pytest.approx(by_id.high)
    # A store of which a part is left out still removes all rows of the examples.
    first = twice.dataset.select(range(EXAMPLES))
    part = replace(twice, dataset=first, recorded=twice.covariance)
    assert part.what_if(range(9), queries).change == pytest.approx(by_id.change)
    assert part.what_if(range(9), queries).high == pytest.approx(by_id.high)
    # The second time takes back the first: the interval has the spread of the two.
    single = rows.what_if(range(9), queries)
    assert by_id.change == pytest.approx(0, abs=1e-6)
    first_order = single.high - single.low  # of one time, without any spread
    assert by_id.high - by_id.low > first_order


def test_what_cannot_be_answered_is_refused(fitted):
    _, _, rows, queries = fitted
    with pytest.raises(ValueError, match="some examples must stay, got all 60"):
        rows.what_if(range(60), queries)
    with pytest.raises(ValueError, match=r"{'example_id': \[99\]}, got none"):
        rows.what_if([99], queries)


def test_it_introduces_itself_in_a_sentence(fitted):
    _, _, rows, queries = fitted
    text = repr(rows.what_if([1, 2], queries))
    assert text.startswith(
        "Without 2 of 60 examples the mean loss of 5 queries changes"
    )
