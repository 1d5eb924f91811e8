"""The error that a store knows of itself, beside a computation by hand."""

import pytest
import torch
from torch import nn

from hf_sketch import ExampleSketcher, ModelSketch, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples import measured_error
from hf_sketch.store.contents import describe
from tests.helpers.trained.training import tiny_batch, tiny_bert, tiny_trainer

SIZE = 64


@pytest.fixture
def model():
    return tiny_bert().double().train()


def gradients_of(model, batch):
    """Each example's gradient, flattened, from a pass of its own."""
    model.eval()
    rows = []
    for index in range(len(batch["labels"])):
        alone = {name: column[index : index + 1] for name, column in batch.items()}
        parts = torch.autograd.grad(model(**alone).loss, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def measure(model, *batches, **options):
    sketch = ModelSketch.from_model(model, SIZE)
    with ExampleSketcher(model, sketch) as sketcher:
        return measured_error.measure_error(sketcher, batches, **options)


@pytest.mark.parametrize("held_bytes", [2**30, 1])
def test_the_figures_are_those_of_the_definitions(model, held_bytes, monkeypatch):
    monkeypatch.setattr(measured_error, "_HELD_BYTES", held_bytes)
    first, second = tiny_batch(5), tiny_batch(3, seed=2)
    got = measure(model, first, second)
    exact = torch.cat([gradients_of(model, batch) for batch in (first, second)])
    sketch = ModelSketch.from_model(model, SIZE)
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    rows = sketch.sketch_rows(dict(zip(names, exact.split(sizes, 1), strict=True)))
    pairs = [(i, j) for i in range(8) for j in range(i)]
    wanted = torch.stack([exact[i] @ exact[j] for i, j in pairs])
    sketched = torch.stack([rows[i] @ rows[j] for i, j in pairs])
    norms = torch.stack([exact[i].norm() * exact[j].norm() for i, j in pairs])
    r = torch.corrcoef(torch.stack([wanted, sketched]))[0, 1]
    assert got.examples == 8
    assert got.pearson_r == pytest.approx(float(r), rel=1e-9)
    relative = ((sketched - wanted) / norms).abs().median()
    assert got.relative_error == pytest.approx(float(relative), rel=1e-9)
    assert got.row_error < 1e-9


def test_the_share_of_the_exact_top_10_is_measured_from_21_examples_on(model):
    batch = tiny_batch(21)
    got = measure(model, batch, examples=21)
    exact = gradients_of(model, batch)
    sketch = ModelSketch.from_model(model, SIZE)
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    rows = sketch.sketch_rows(dict(zip(names, exact.split(sizes, 1), strict=True)))

    def top_10(vectors, place):
        products = (vectors @ vectors[place]).tolist()
        others = [other for other in range(21) if other != place]
        return set(sorted(others, key=products.__getitem__)[-10:])

    found = [len(top_10(exact, i) & top_10(rows, i)) for i in range(21)]
    assert got.top_found == pytest.approx(sum(found) / 210)
    assert 0.5 < got.top_found < 1
    assert f"{got.top_found:.0%} of the exact top 10 found" in str(got)
    fewer = measure(model, batch, examples=20)
    assert fewer.top_found is None
    assert "top 10" not in str(fewer)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_without_memory_for_it_there_is_a_warning(model, error, monkeypatch):
    def grow(*_, **__):
        raise error("8 GiB asked for")

    monkeypatch.setattr(measured_error, "_product", grow)
    with pytest.warns(UserWarning, match=r"not compared .*: out of memory \(8 GiB"):
        assert measure(model, tiny_batch(3)) is None
    monkeypatch.undo()
    assert measure(model, tiny_batch(3)).examples == 3


def test_examples_without_a_loss_are_passed_over(model):
    batch = tiny_batch(5)
    batch["labels"][1] = -100
    assert measure(model, batch, examples=3).examples == 3
    assert measure(model, batch).examples == 4


def test_examples_that_reach_no_parameter_are_passed_over(model):
    table = model.bert.embeddings.word_embeddings
    model.requires_grad_(False)
    table.weight.requires_grad_()
    kept = torch.zeros(len(table.weight), 1)
    kept[tiny_batch(5)["input_ids"][:4].unique()] = 1.0
    table.weight.register_hook(lambda gradient: gradient * kept)
    batch = tiny_batch(5)
    batch["input_ids"][4] = (kept == 0).nonzero()[0, 0]
    got = measure(model, batch)
    assert got.examples == 4
    assert got.row_error < 1e-9
    assert got.relative_error < 1


def test_without_an_example_that_has_a_loss_there_is_nothing_to_measure(model):
    batch = tiny_batch(3)
    batch["labels"][:] = -100
    assert measure(model, batch).examples == 0


def test_one_example_has_no_pair(model):
    got = measure(model, tiny_batch(1))
    assert (got.examples, got.pearson_r, got.relative_error) == (1, None, None)
    assert got.row_error < 1e-9


def test_the_model_and_its_gradients_are_left_as_they_were(model):
    model(**tiny_batch()).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    measure(model, tiny_batch())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)


class Centred(nn.Linear):
    """Lets examples see each other."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def test_a_model_whose_examples_see_each_other_is_refused(model):
    model.classifier = Centred(32, 3).double()
    message = "BertForSequenceClassification gives an example other outputs without"
    with pytest.raises(ValueError, match=message):
        measure(model, tiny_batch())


class Swapped(torch.autograd.Function):
    """Gives each example the gradient of another."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(0)


def test_rows_that_are_not_those_of_their_example_are_refused(model):
    model.classifier.register_forward_hook(lambda *call: Swapped.apply(call[2]))
    message = r"of its example alone within 0.0001 .*, got .* BertForSequence"
    sketch = ModelSketch.from_model(model, SIZE)
    with (
        ExampleSketcher(model, sketch, verify=False) as sketcher,
        pytest.raises(RuntimeError, match=message),
    ):
        measured_error.measure_error(sketcher, [tiny_batch()])


def test_the_store_says_how_far_its_inner_products_are_off(tmp_path):
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(4096))
    trainer.train()
    error = load_sketches(tmp_path).measured_error
    assert error.examples == 3
    assert 0.9 < error.pearson_r <= 1
    assert 0 < error.relative_error < 0.1
    assert error.row_error < 1e-4


def test_a_store_compares_the_number_of_examples_that_it_is_given(tmp_path):
    callback = GradientSketchCallback(256, measure_error=21)
    tiny_trainer(
        tmp_path, callback, per_device_train_batch_size=11, num_train_epochs=1
    ).train()
    error = load_sketches(tmp_path).measured_error
    assert error.examples == 21
    assert f"{error.top_found:.0%} of the exact top 10" in describe(
        tmp_path / "sketches"
    )


def test_the_error_is_measured_once_for_a_store(tmp_path):
    tiny_trainer(tmp_path, GradientSketchCallback(256)).train()
    before = load_sketches(tmp_path).measured_error
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(256), num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert load_sketches(tmp_path).measured_error == before
