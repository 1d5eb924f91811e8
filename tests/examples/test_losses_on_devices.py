"""On an accelerator the device itself finds what a loss is; here the CPU plays one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples import losses as losses_module
from hf_sketch.examples.attempt import RefusalError
from hf_sketch.examples.losses import example_losses
from hf_sketch.examples.modules import known_losses
from hf_sketch.examples.rules.nearest_loss import nearest
from hf_sketch.sketches import outer
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model

SIZE = 64
IGNORED = -100


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Numbers are read as if Python had to wait for them."""
    monkeypatch.setattr(known_losses, "reads_freely", lambda x: False)
    monkeypatch.setattr(outer, "reads_freely", lambda x: False)


class Classifier(nn.Module):
    """Scores of three classes, and a loss that tests may replace."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3)
        self.loss = functional.cross_entropy

    def forward(self, x, labels):
        logits = self.linear(x)
        return {"loss": self.loss(logits, labels), "logits": logits}


def batch_of(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return {"x": x, "labels": torch.randint(3, (size,), generator=generator)}


def recorded(model, batches, losses=None):
    """The rows of each batch, whose loss may be another one."""
    sketch = ModelSketch.from_model(model, 16)
    found = []
    with ExampleSketcher(model, sketch) as sketcher:
        for number, batch in enumerate(batches):
            if losses is not None:
                model.loss = losses[number]
            model(**batch)["loss"].backward()
            found.append(sketcher.take())
    return found


def assert_equal(got, expected):
    for name in ("rows", "losses", "weights"):
        pair = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


def counted(monkeypatch):
    """The losses that Python waits for, as they come."""
    seen, plain = [], losses_module.read_together

    def read(*numbers):
        seen.append(numbers)
        return plain(*numbers)

    monkeypatch.setattr(losses_module, "read_together", read)
    return seen


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_the_device_finds_what_python_would(name, monkeypatch):
    """Also of examples without labels, of a step's count of tokens, and of NaN."""
    batches = [tiny_inputs(name, seed) for seed in range(5)]
    if name == "gpt2":
        batches[1]["labels"][0] = IGNORED
        batches[3]["labels"][:] = IGNORED
    batches[2] |= {"num_items_in_batch": torch.tensor(17)} if name == "gpt2" else {}
    expected = recorded(tiny_model(name, torch.float32), batches)
    monkeypatch.setattr(known_losses, "reads_freely", lambda x: False)
    reads = counted(monkeypatch)
    got = recorded(tiny_model(name, torch.float32), batches)
    assert len(reads) <= 2  # of the first batch
    for pair in zip(got, expected, strict=True):
        assert_equal(*pair)


def penalised(logits, labels):
    return functional.cross_entropy(logits, labels) + logits.pow(2).mean()


def comparing(logits, labels):
    return functional.cross_entropy(logits, labels) * logits.mean().exp()


@pytest.mark.usefixtures("as_on_a_device")
def test_another_loss_gives_shares_until_it_is_known():
    """The first such batch by shares, the next as if it were the first of all."""
    model, plain = Classifier(), functional.cross_entropy
    batches = [batch_of(seed) for seed in range(3)]
    batches[1]["labels"][0] = IGNORED
    _, shares, known = recorded(model, batches, [plain, penalised, penalised])
    assert shares.losses.isnan().all()
    assert torch.equal(shares.weights, torch.full((4,), 0.25))
    sketch = ModelSketch.from_model(model, 16)
    logits, labels = model.linear(batches[1]["x"]), batches[1]["labels"]
    own = functional.cross_entropy(logits, labels, reduction="none")
    for index, share in enumerate(own / 3 + logits.pow(2).mean(1) / 4):
        gradients = torch.autograd.grad(share, model.parameters(), retain_graph=True)
        row = 4 * sketch.sketch(dict(zip(dict(sketch.shapes), gradients, strict=True)))
        torch.testing.assert_close(shares.rows[index], row, rtol=1e-4, atol=1e-5)
    (expected,) = recorded(Classifier(), batches[2:], [penalised])
    assert_equal(known, expected)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_loss_that_compares_examples_is_refused_a_batch_later():
    losses = [functional.cross_entropy, comparing, comparing]
    with pytest.raises(RefusalError, match="weighted sum of the examples' own losses"):
        recorded(Classifier(), [batch_of(seed) for seed in range(3)], losses)


def test_what_is_on_its_way_is_not_waited_for(monkeypatch):
    """It is looked at when it has arrived."""
    monkeypatch.setattr(known_losses, "reads_freely", lambda x: False)
    arrived = []
    here = property(lambda self: bool(arrived))
    monkeypatch.setattr(known_losses._Arrival, "is_here", here)
    plain = functional.cross_entropy
    losses = [plain, comparing, comparing]
    batches = [batch_of(seed) for seed in range(3)]
    found = recorded(Classifier(), batches, losses)
    assert [bool(x.losses.isnan().all()) for x in found] == [False, True, True]


@pytest.mark.parametrize(
    ("loss", "totals", "place", "known"),
    [
        (1.0, [2.0, 1 + 1e-6, 1.0], 1, True),  # the first that is certain
        (1.0, [1 + 1.5e-5, 1 + 1e-5], 1, True),  # the nearest
        (1.0, [1.1, 1.01], 1, False),
        (100.0, [100.001], 0, True),  # in parts of the loss
        (0.001, [0.00101], 0, True),  # or of 1
        (float("nan"), [2.0, 3.0], 0, True),
        (float("inf"), [2.0, 3.0], 0, True),
    ],
)
def test_the_nearest_rule_is_found(loss, totals, place, known):
    totals = [torch.tensor(x) for x in totals]
    got = nearest(torch.tensor(loss), totals, torch.rand(2, 3))
    assert (int(got[0]), bool(got[1])) == (place, known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_16_bits_allow_more_rounding(dtype):
    """As Python allows it."""
    logits = torch.randn(4, 3).to(dtype).float()
    labels = torch.randint(3, (4,))
    exact = functional.cross_entropy(logits, labels)
    loss = exact * (1 + 3e-4)
    _, known = nearest(loss, [exact], logits)
    assert bool(known) == (dtype != torch.float32)
    if known:
        example_losses(loss, logits, labels)
