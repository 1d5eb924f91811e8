"""Rows with the greatest exact scores, beside all scores in float64."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_sketch import CounterRandom, ModelSketch, Normalizer, sketch_dataset
from hf_sketch.attribution.questions.certified import _student

ROWS, WIDTH, CLASSES, TOP = 300, 40, 4, 5


class Classifier(torch.nn.Module):
    """Logistic regression, with a layer that is not used."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = 0.1 * torch.randn(CLASSES, WIDTH, generator=generator)
        self.weight = torch.nn.Parameter(weight)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x, labels):
        logits = x @ self.weight.T
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def loss_fn(output, batch):
    return torch.nn.functional.cross_entropy(
        output["logits"], batch["labels"], reduction="none"
    )


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = centres[labels] + torch.randn(count, WIDTH, generator=generator)
    data = Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})
    return data.with_format("torch"), x, labels


@pytest.fixture(scope="module")
def model():
    return Classifier()


def gradients(model, x, labels):
    """Each example's gradient in closed form, float64."""
    weight = model.weight.detach().double()
    off = (x.double() @ weight.T).softmax(1)
    off -= torch.nn.functional.one_hot(labels, CLASSES)
    return (off.unsqueeze(2) * x.double().unsqueeze(1)).flatten(1)


def sketched(model, data, seed, out_size=64):
    sketch = ModelSketch.from_model(model, out_size, seed=seed)
    return sketch_dataset(model, data, sketch, loss_fn=loss_fn, batch_size=100)


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_no_row_of_the_exact_top_is_missing_and_few_are_computed(model, method):
    data, x, labels = examples(ROWS, 0)
    queries, *of_queries = examples(4, 1)
    rows, asked = gradients(model, x, labels), gradients(model, *of_queries)
    exact = asked @ rows.T
    if method == "cosine":
        exact /= rows.norm(dim=1) * asked.norm(dim=1, keepdim=True)
    wanted = exact.topk(TOP)
    for seed in range(6):
        store = sketched(model, data, seed)
        options = {"method": method, "loss_fn": loss_fn, "seed": seed, "sample": 32}
        found = store.certified_top(model, data, queries, TOP, **options)
        lines = found.lines
        ids = torch.tensor(lines["example_id"][:]).view(4, TOP)
        assert torch.equal(ids, wanted.indices)
        scores = torch.tensor(lines["score"][:], dtype=torch.float64).view(4, TOP)
        torch.testing.assert_close(scores, wanted.values, rtol=1e-5, atol=1e-6)
        assert lines["rank"][:] == [*range(TOP)] * 4
        assert lines["query"][:] == [i for i in range(4) for _ in range(TOP)]
        assert found.computed < 0.9 * ROWS
        assert int(found.examined.max()) <= found.computed
        assert (found.errors > 0.5 / 64**0.5).all()
        assert (found.errors < 2 / 64**0.5).all()


def test_rows_are_computed_down_to_the_bound_that_is_documented(model):
    data, x, labels = examples(ROWS, 0)
    queries, *of_queries = examples(3, 1)
    store = sketched(model, data, 0)
    found = store.certified_top(
        model, data, queries, TOP, confidence=0.95, loss_fn=loss_fn, seed=5
    )
    rows, asked = gradients(model, x, labels), gradients(model, *of_queries)
    exact = asked @ rows.T / asked.norm(dim=1, keepdim=True)
    sketches = torch.tensor(store.dataset["sketch"][:], dtype=torch.float64)
    norms = sketches.norm(dim=1)
    matrix = {"weight": asked.view(3, CLASSES, WIDTH).float()}
    of_asked = torch.stack(
        [store.model_sketch.sketch({"weight": one}) for one in matrix["weight"]]
    ).double()
    cosines = torch.nn.functional.cosine_similarity(
        of_asked.unsqueeze(1), sketches.unsqueeze(0), dim=2
    )
    spread = (1 + cosines**2).sqrt()
    known = CounterRandom(5, "certified").permutation(ROWS)[:64].tolist()
    off = (((cosines - exact / norms) / spread) ** 2)[:, known]
    error = torch.maximum(off.mean(1), off.mean()).sqrt()
    torch.testing.assert_close(found.errors, error, rtol=1e-3, atol=0)
    width = 2.387 * error.unsqueeze(1)  # Student's t for 64 and 1 - 0.05 / 5
    bounds = (cosines + width * spread) * norms
    known = set(known)
    for query, order in enumerate(bounds.argsort(dim=1, descending=True).tolist()):
        for count, row in enumerate(order):
            best = exact[query, sorted(known)].topk(TOP).values[-1]
            if bounds[query, row] < best:
                assert abs(count - int(found.examined[query])) <= 1  # rounding
                break
            known.add(row)
    assert abs(len(known) - found.computed) <= 3


def test_more_confidence_takes_more_rows_and_all_are_enough(model):
    data, *_ = examples(ROWS, 0)
    queries, *_ = examples(1, 1)
    store = sketched(model, data, 0)
    examined = [
        int(
            store.certified_top(
                model, data, queries, TOP, confidence=confidence, loss_fn=loss_fn
            ).examined
        )
        for confidence in (0.5, 0.99, 1 - 1e-12)
    ]
    assert examined == sorted(set(examined))
    few = store.where(example_id=range(20))
    found = few.certified_top(model, data, queries, 50, loss_fn=loss_fn)
    assert sorted(found.lines["example_id"][:]) == [*range(20)]
    assert found.computed == 20
    assert "20 of 20 exact gradients" in repr(found)


def test_gradients_are_scaled_by_a_normalizer_as_rows_are():
    model = Classifier()
    model.unused.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    data, x, labels = examples(ROWS, 0)
    loss_fn(model(x, labels), {"labels": labels}).mean().backward()
    optimizer.step()
    model.zero_grad()
    normalizer = Normalizer.from_optimizer(model, optimizer)
    sketch = ModelSketch.from_model(model, 64, normalizer=normalizer)
    store = sketch_dataset(model, data, sketch, loss_fn=loss_fn)
    queries, *of_queries = examples(1, 1)
    found = store.certified_top(model, data, queries, TOP, loss_fn=loss_fn)
    scale = normalizer.elements("weight", 0, WIDTH * CLASSES, x).double()
    rows = gradients(model, x, labels) * scale
    wanted = (rows @ (gradients(model, *of_queries) * scale)[0]).topk(TOP)
    assert found.lines["example_id"][:] == wanted.indices.tolist()
    assert found.lines["score"][:] == pytest.approx(wanted.values.tolist(), rel=1e-4)


def test_rows_of_other_weights_or_of_several_states_are_refused(model):
    data, *_ = examples(40, 0)
    queries, *_ = examples(1, 1)
    store = sketched(model, data, 0)
    other = Classifier()
    torch.nn.init.zeros_(other.weight)
    with pytest.raises(ValueError, match=r"off by .* of its norm. Pass the checkpoint"):
        store.certified_top(other, data, queries, loss_fn=loss_fn)
    twice = replace(store, dataset=concatenate_datasets([store.dataset] * 2))
    with pytest.raises(ValueError, match=r"got 80 rows of 40 examples.*where\(step"):
        twice.certified_top(model, data, queries, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 99"):
        store.certified_top(model, data, queries, confidence=99, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=r"sample must be .* at least 16, got 4"):
        store.certified_top(model, data, queries, sample=4, loss_fn=loss_fn)


def test_quantiles_of_students_t_are_those_of_tables():
    assert _student(0.999, 60) == pytest.approx(3.232, abs=2e-3)
    assert _student(0.99, 30) == pytest.approx(2.457, abs=2e-3)
    assert _student(0.999, 16) == pytest.approx(3.686, abs=5e-3)


def blank(data, numbers):
    """The same examples, but some with a gradient of zero."""
    x = data["x"][:].clone()
    x[numbers] = 0
    columns = {"x": x.tolist(), "labels": data["labels"][:].tolist()}
    return Dataset.from_dict(columns).with_format("torch")


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_rows_of_zero_are_not_at_the_top(model, method):
    data, x, labels = examples(40, 0)
    data, x[[5, 9]] = blank(data, [5, 9]), 0
    queries, *of_queries = examples(2, 1)
    store = sketched(model, data, 0)
    found = store.certified_top(
        model, data, queries, TOP, method=method, sample=40, loss_fn=loss_fn
    )
    rows, asked = gradients(model, x, labels), gradients(model, *of_queries)
    scores = asked @ rows.T
    if method == "cosine":
        norms = asked.norm(dim=1, keepdim=True) * rows.norm(dim=1)
        scores = scores / norms.clamp(min=1e-30)
    assert found.lines["example_id"][:] == scores.topk(TOP).indices.flatten().tolist()
    everything = store.certified_top(
        model, data, queries, 40, method=method, loss_fn=loss_fn
    )
    ranked = scores.sort(dim=1, descending=True).values.flatten()
    assert everything.lines["score"][:] == pytest.approx(ranked.tolist(), abs=1e-5)
    # The error is that of the others: zeros would make it look smaller.
    others = [number for number in range(40) if number not in (5, 9)]
    expected = sketched(model, data.select(others), 0).certified_top(
        model, data.select(others), queries, TOP, method=method, loss_fn=loss_fn
    )
    torch.testing.assert_close(found.errors, expected.errors)


def test_queries_and_weights_that_say_nothing_are_refused(model):
    data, *_ = examples(40, 0)
    queries = blank(examples(3, 1)[0], [1])
    store = sketched(model, data, 0)
    with pytest.raises(ValueError, match=r"the queries \[1\] are zero or not finite"):
        store.certified_top(model, data, queries, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="got 0 queries and 40 rows other"):
        store.certified_top(model, data, queries.select([]), loss_fn=loss_fn)
    zeros = blank(data, [*range(40)])
    with pytest.raises(ValueError, match="got 3 queries and 0 rows other"):
        sketched(model, zeros, 0).certified_top(model, zeros, queries, loss_fn=loss_fn)


@pytest.mark.parametrize("place", [0, -1], ids=["in the sample", "later"])
def test_an_example_whose_gradient_is_not_finite_is_named(model, place):
    data, x, _ = examples(40, 0)
    store = sketched(model, data, 0)
    number = int(CounterRandom(0, "certified").permutation(40)[place])

    def broken(output, batch):
        found = (batch["x"] == x[number]).all(1)
        return loss_fn(output, batch) * found.float().mul(torch.nan).where(found, 1)

    settings = {"top_k": 40, "sample": 16, "loss_fn": broken}
    with pytest.raises(ValueError, match=f"of example {number} is not .*checkpoint"):
        store.certified_top(model, data, examples(1, 1)[0], **settings)
