"""Optimizers that step within the backward pass, and leave no gradient to read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording.arriving import ArrivingGradients
from tests.helpers.rows import assert_same_rows
from tests.helpers.trained.training import tiny_batch, tiny_bert, tiny_trainer

SIZE = 256
RATE = 0.01
ONE_BATCH = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
STEADY = {**ONE_BATCH, "save_strategy": "no", "lr_scheduler_type": "constant"}


class Gated(nn.Module):
    """A head of no known kind, which is run again for each example."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-0.1, 0.1, 96).view(3, 32))
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def forward(self, x):
        return (x @ self.matrix.T) * self.gate.exp()


def gated_bert():
    model = tiny_bert()
    model.classifier = Gated()
    return model


def layer_by_layer(model):
    """Gradient descent as GaLore's layer-wise optimizers do it, and its scheduler."""
    optimizers = {p: torch.optim.SGD([p], RATE) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = LayerWiseDummyOptimizer(optimizer_dict=optimizers)
    return optimizer, ConstantLR(optimizer, 1.0)


def trained(directory, *callbacks, layerwise):
    model = gated_bert()
    chosen = layer_by_layer(model) if layerwise else (None, None)
    settings = {**STEADY, "optim": "sgd", "learning_rate": RATE}
    trainer = tiny_trainer(directory, *callbacks, model=model, **settings)
    trainer.optimizer, trainer.lr_scheduler = chosen
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize("per_example", [True, False])
def test_rows_of_a_layer_wise_optimizer_are_those_of_a_plain_one(tmp_path, per_example):
    for name in ("plain", "layerwise"):
        callback = GradientSketchCallback(SIZE, per_example=per_example)
        trained(tmp_path / name, callback, layerwise=name == "layerwise")
    got, wanted = (load_sketches(tmp_path / name) for name in ("layerwise", "plain"))
    if per_example:
        assert_same_rows(got, wanted)
    for column in ("sketch", "gradient_norm", "clip_factor", "learning_rate"):
        torch.testing.assert_close(
            torch.tensor(got.steps[column]),
            torch.tensor(wanted.steps[column]),
            rtol=1e-5,
            atol=1e-6,
        )


def test_training_by_a_layer_wise_optimizer_is_what_it_was(tmp_path):
    plain = trained(tmp_path / "plain", layerwise=True)
    callback = GradientSketchCallback(SIZE)
    watched = trained(tmp_path / "watched", callback, layerwise=True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize(("most", "factor"), [(0.0, 1.0), (100.0, 1.0), (0.1, None)])
def test_a_row_is_clipped_as_deepspeed_clips(most, factor):
    model = tiny_bert().eval()
    sketch = ModelSketch.from_model(model, SIZE)
    model(**tiny_batch()).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    engine = SimpleNamespace(
        get_global_grad_norm=lambda: norm, gradient_clipping=lambda: most
    )
    reader = ArrivingGradients(sketch, sketch.parameters_of(model), engine)
    model.zero_grad()
    with reader.watched(None):
        (8.0 * model(**tiny_batch()).loss).backward()
    row = reader.columns({}, 8.0)
    factor = float(most / norm) if factor is None else factor
    assert float(row["clip_factor"]) == pytest.approx(factor, rel=1e-4)
    torch.testing.assert_close(
        row["sketch"][0], factor * sketch.sketch(gradients), rtol=1e-4, atol=1e-6
    )


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize(
    ("package", "optim", "same"),
    [("galore_torch", "galore_adamw", "_layerwise"), ("lomo_optim", "sgd", "")],
)
def test_rows_of_a_package_are_those_of_a_plain_optimizer(
    tmp_path, package, optim, same
):
    pytest.importorskip(package)
    other = optim + same if same else "lomo"
    settings = {"optim_target_modules": "all-linear"} if same else {}
    for name in (optim, other):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        arguments = {**STEADY, **settings, "optim": name}
        callback = GradientSketchCallback(SIZE)
        trainer = tiny_trainer(tmp_path / name, callback, model=model, **arguments)
        trainer.args.data_seed = 3  # a layer-wise optimizer draws a random number
        trainer.train()
    assert_same_rows(*(load_sketches(tmp_path / name) for name in (other, optim)))


@pytest.mark.parametrize("most", [0.1, 100.0])
def test_a_row_shows_the_clipping_of_an_optimizer_that_deepspeed_calls(most):
    """Without ZeRO, DeepSpeed does not expose the norm."""
    model = tiny_bert().eval()
    sketch = ModelSketch.from_model(model, SIZE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = SimpleNamespace(gradient_clipping=lambda: most)
    parameters = sketch.parameters_of(model)
    reader = ArrivingGradients(sketch, parameters, engine, optimizer)
    with reader.watched(None):
        model(**tiny_batch()).loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), most))
        seen = sketch.sketch({n: p.grad.clone() for n, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    row = reader.columns({}, 1.0)
    assert float(row["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(row["clip_factor"]) == pytest.approx(min(1.0, most / norm), rel=1e-4)
    torch.testing.assert_close(row["sketch"][0], seen, rtol=1e-4, atol=1e-6)
