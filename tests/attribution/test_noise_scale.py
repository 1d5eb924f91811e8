"""The noise scale of steps, beside exact gradients and known distributions."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.func import functional_call, grad, vmap

from hf_sketch import load_sketches
from hf_sketch.attribution.questions.noise import ratio_of_means
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.report.training import noise_course
from tests.helpers.trained.training import tiny_trainer

ROWS, BATCH = 96, 8
QUANTILE = NormalDist().inv_cdf(0.975)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)
        )

    def forward(self, x, labels):
        logits = self.layers(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 30, generator=generator)
    return x, (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 1).long()


def exact_noise_and_signal(model):
    """tr(Sigma) and |G|^2 of the training rows, by a gradient of each."""
    parameters = {n: p.detach().double() for n, p in model.named_parameters()}

    def loss(parameters, x, label):
        given = {"x": x[None], "labels": label[None]}
        return functional_call(model, parameters, (), given)["loss"]

    x, labels = data()
    found = vmap(grad(loss), (None, 0, 0))(parameters, x.double(), labels)
    rows = torch.cat([part.flatten(1) for part in found.values()], 1)
    mean = rows.mean(0)
    noise = (rows - mean).square().sum() / (len(rows) - 1)
    return float(noise), float(mean.square().sum())


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Steps at one point: the weights stay as they are."""
    x, labels = data()
    rows = Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})
    model = Net()
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("still"),
        GradientSketchCallback(1024, measure_error=False),
        model=model,
        dataset=rows,
        learning_rate=0.0,
        num_train_epochs=20,
        per_device_train_batch_size=BATCH // 2,
        max_grad_norm=0.05,
        save_strategy="no",
    )
    trainer.train()
    return load_sketches(trainer.args.output_dir), *exact_noise_and_signal(model)


def test_it_is_that_of_exact_gradients_of_every_example(still):
    store, noise, signal = still
    lines = store.noise_scale(window=240).to_pandas()
    assert len(lines) == 20 * ROWS // BATCH
    assert (lines["step_examples"] == BATCH).all()
    assert lines["noise"].mean() == pytest.approx(noise, rel=0.1)
    assert lines["signal"].mean() == pytest.approx(signal, rel=0.1)
    last = lines.iloc[-1]
    assert last["noise_scale"] == pytest.approx(noise / signal, rel=0.1)
    # 1024 numbers scatter |G|^2 by a relative sqrt(2 / 1024), beside the interval.
    assert 0.95 * last["low"] < noise / signal < 1.05 * last["high"]
    assert last["low"] < last["noise_scale"] < last["high"]
    assert lines["low"][:9].isna().all()
    assert not lines["low"][9:].isna().any()


def test_rows_that_are_drawn_from_an_endless_stream_have_less_signal(still):
    """Without the term of the finite training set, |G|^2 is less by tr(Sigma) / N."""
    store, *_ = still
    finite = store.noise_scale().to_pandas()
    endless = store.noise_scale(train_rows=10**12).to_pandas()
    gap = (finite["signal"] - endless["signal"]).to_numpy()
    np.testing.assert_allclose(gap, finite["noise"] / ROWS, rtol=1e-6)


def test_settings_and_stores_that_do_not_fit_are_refused(still):
    store, *_ = still
    with pytest.raises(ValueError, match=r"window must be .* 10"):
        store.noise_scale(window=9)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        store.noise_scale(confidence=1)
    with pytest.raises(ValueError, match=r"per_step=True, per_example=True"):
        store.step_rows().noise_scale()
    twice = replace(store, steps=concatenate_datasets([store.steps, store.steps]))
    with pytest.raises(ValueError, match=r"several rows of one step.*each run"):
        twice.noise_scale()
    one_each = np.zeros(len(store), dtype=np.int64)
    same = replace(store, dataset=store.dataset.add_column("part", one_each))
    assert same.noise_scale().to_pandas().equals(store.noise_scale().to_pandas())
    parts = replace(store, dataset=store.dataset.add_column("part", one_each + 1))
    with pytest.raises(ValueError, match=r"one row per example.*per_row=False"):
        parts.noise_scale()
    assert noise_course(parts) is None


@pytest.mark.parametrize("signal", [1.0, 0.1])
def test_the_interval_covers_a_known_ratio_as_often_as_it_says(signal):
    """Correlated pairs, as of a step: more noise, less signal."""
    rng = np.random.default_rng(0)
    trials, steps, noise = 1000, 50, 5.0
    covered = 0
    for _ in range(trials):
        x = noise + rng.standard_normal(steps)
        y = signal + rng.standard_normal(steps) - 0.5 * (x - noise)
        ratio, low, high = ratio_of_means(np.stack([x, y]), QUANTILE)
        assert low <= ratio <= high
        covered += low <= noise / signal <= high
    # Of 1000 trials at 95%, three standard deviations are 21; a normal quantile in
    # place of Student's takes some 6 more.
    assert 922 <= covered <= 971


def test_an_interval_of_pure_noise_has_no_upper_end():
    x = np.full(40, 3.0)
    y = np.resize([1.0, -1.0], 40)
    ratio, low, high = ratio_of_means(np.stack([x, y]), QUANTILE)
    assert (ratio, high) == (np.inf, np.inf)
    # Of mean 0, |y| stays below 1.96 standard errors: 3 / (1.96 std / sqrt(40)).
    assert low == pytest.approx(3 / (QUANTILE * y.std(ddof=1) / 40**0.5))
