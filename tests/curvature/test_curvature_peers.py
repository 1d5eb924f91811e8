"""The defects found in other tools: each of them would fail here."""

import pytest
import torch

from hf_sketch import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
)
from tests.helpers.curvature_oracles import (
    AUTOGRAD,
    BOTH,
    FINITE,
    TOLERANCE,
    assert_right,
    direction,
    exact,
    flat,
    relative,
    trainable,
)
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model

DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


@pytest.mark.parametrize("name", ["llama", "bert", *full("gpt2", "t5")])
def test_silu_layer_norm_and_rms_norm_are_differentiated_also_without_grad_mode(name):
    with torch.no_grad():
        assert_right(tiny_model(name).float(), tiny_inputs(name), AUTOGRAD)


def unevenly_labelled():
    """Three batches of GPT-2 with 1, 10 and 3 labels that count."""
    whole = tiny_inputs("gpt2")
    whole["labels"][0, 2:] = -100
    batches = [{k: v[rows] for k, v in whole.items()} for rows in ([0], [1, 2], [3])]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert counts == [1, 10, 3]

    def per_token(outputs):
        sums = [o["loss"] * n for o, n in zip(outputs, counts, strict=True)]
        return sum(sums) / sum(counts)

    return batches, per_token


@BOTH
def test_tokens_weigh_alike_with_uneven_padding(mode):
    model = tiny_model("gpt2").float()
    batches, per_token = unevenly_labelled()
    vector = direction(model)
    wanted = exact(model, batches, vector, per_token)
    got = HessianOperator(model, batches, mode=mode) @ vector
    assert relative(flat(got).double(), wanted) < TOLERANCE[mode]
    assert relative(exact(model, batches, vector), wanted) > 0.1  # the mean of batches


def test_the_loss_and_its_sketched_gradient_weigh_tokens_alike_too():
    model = tiny_model("gpt2")
    batches, per_token = unevenly_labelled()
    sketch = ModelSketch.from_model(model, 64)
    operator = HessianOperator(model, batches)
    loss, gradient = operator.loss_and_sketched_gradient(sketch)
    total = per_token([model(**batch) for batch in batches])
    total.backward()
    assert loss == pytest.approx(float(total.detach()))
    direct = {n: p.grad for n, p in model.named_parameters()}
    assert relative(gradient, sketch.sketch(direct)) < 1e-6
    assert relative(flat(operator.gradient()), flat(direct)) < 1e-6


def test_the_trainers_count_of_a_whole_window_changes_nothing():
    model, vector = tiny_model("gpt2"), direction(tiny_model("gpt2"))
    batches, _ = unevenly_labelled()
    counted = [{**batch, "num_items_in_batch": torch.tensor(14)} for batch in batches]
    plain = flat(HessianOperator(model, batches) @ vector)
    assert relative(flat(HessianOperator(model, counted) @ vector), plain) < 1e-6


@pytest.mark.parametrize("name", ["llama", *full("bert")])
def test_bfloat16_weights_have_finite_spectra_in_float64(name):
    model, batch = tiny_model(name), tiny_inputs(name)

    def spectrum():
        sketch = ModelSketch.from_model(model, 128)
        operator = SketchedHessian(HessianOperator(model, [batch]), sketch)
        return hessian_spectrum(operator, 16, progress=False)

    wanted = spectrum()
    model = model.bfloat16()
    got = spectrum()
    assert got.sketched.dtype == torch.float64
    assert got.sketched.isfinite().all()
    assert (got.mode, got.check.difference) == (AUTOGRAD, None)
    # bfloat16 has 8 bits; some operations deep, the largest is within a few percent.
    assert float(got.sketched[-1]) == pytest.approx(float(wanted.sketched[-1]), 0.05)


@pytest.mark.parametrize("norm", [1e-6, 1e8, "signs", *full(1.0, 1e3)])
def test_finite_differences_are_right_for_vectors_of_any_norm(norm):
    model, batch = tiny_model("bert").float(), tiny_inputs("bert")
    vector = direction(model)
    if norm == "signs":
        vector = {n: part.sign() for n, part in vector.items()}
    else:
        scale = norm / flat(vector).norm()
        vector = {n: part * scale for n, part in vector.items()}
    wanted = exact(model, [batch], vector)
    got = HessianOperator(model, [batch], mode=FINITE) @ vector
    assert relative(flat(got).double(), wanted) < 2e-3


def watched(model):
    """All that a product must leave as it is."""
    parameters = dict(model.named_parameters())
    return {
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "theta": {n: p.tolist() for n, p in parameters.items()},
        "gradients": {n: (id(p.grad), p.grad.tolist()) for n, p in parameters.items()},
    }


@BOTH
@pytest.mark.parametrize("form", ["plain", "sketched"])
def test_models_in_train_mode_with_dropout_are_taken_in_eval_mode(mode, form):
    model, batch = tiny_model("bert", **DROPOUT).float(), tiny_inputs("bert")
    vector, sketch = direction(model), ModelSketch.from_model(model, 64)
    operator = HessianOperator(model, [batch], mode=mode)

    def product():
        if form == "plain":
            return flat(operator @ vector)
        return operator.sketched_product(sketch, torch.ones(64))

    wanted = product()
    model.train()
    model.bert.encoder.layer[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = watched(model)
    assert torch.equal(product(), wanted)
    assert torch.equal(product(), wanted)
    assert watched(model) == before


@BOTH
@pytest.mark.parametrize("fails_at", [1, 3, *full(2, 4)])
def test_a_loss_that_fails_leaves_all_as_it_was(mode, fails_at):
    model, batch = tiny_model("bert", **DROPOUT).float(), tiny_inputs("bert")
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    calls = []

    def loss_fn(output, inputs):
        calls.append(True)
        if len(calls) == fails_at:
            raise KeyError("the loss")
        return output.loss

    sketch, before = ModelSketch.from_model(model, 64), watched(model)
    operator = HessianOperator(model, [batch], loss_fn, mode=mode)
    with pytest.raises(KeyError, match="the loss"):
        operator.sketched_product(sketch, torch.ones(64))
    calls.clear()
    with pytest.raises(KeyError, match="the loss"):
        operator @ direction(model)
    assert watched(model) == before


@BOTH
def test_tied_weights_count_once_and_frozen_ones_not_at_all(mode):
    model, batch = tiny_model("gpt2").float(), tiny_inputs("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.transformer.wpe.requires_grad_(False)
    operator = HessianOperator(model, [batch], mode=mode)
    assert set(operator.parameters) == set(trainable(model))
    assert_right(model, batch, mode)
    assert model.transformer.wpe.weight.grad is None


class Sum(torch.nn.Module):
    """The loss is (the sum over two parameters that are added up)^4 / 4 on each row."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).double())
        self.q = torch.nn.Parameter(torch.tensor([0.5, 1.0, 1.5]).double())

    def forward(self, x):
        return {"loss": ((self.p + self.q + x).square().sum(1).square() / 4).mean()}


@BOTH
def test_parameters_with_one_and_the_same_gradient_are_right_over_batches(mode):
    # Autograd gives both the same tensor: what is added in place is added twice.
    model = Sum()
    batches = [{"x": torch.linspace(a, 1, 6).double().view(2, 3)} for a in (0, 2, 4)]
    vector = {"p": torch.tensor([1.0, 2.0, 3.0]), "q": torch.tensor([0.0, -1.0, 1.0])}
    wanted = exact(model, batches, vector)
    got = HessianOperator(model, batches, lambda o, _: o["loss"], mode=mode) @ vector
    assert relative(flat(got), wanted) < (1e-12 if mode == AUTOGRAD else 1e-6)


@BOTH
def test_a_loss_that_is_linear_has_no_curvature(mode):
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    batches = [{"input": torch.ones(2, 3).double()}] * 2
    operator = HessianOperator(model, batches, lambda o, _: o.mean(), mode=mode)
    got = flat(operator @ {"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    assert got.abs().max() < 1e-9
    assert (operator.check.difference or 0) == operator.check.asymmetry == 0


def test_the_fisher_matrix_is_that_of_the_present_parameters():
    model, batch = tiny_model("gpt2"), tiny_inputs("gpt2")
    batch["labels"][1] = -100
    sketch, v = ModelSketch.from_model(model, 32), torch.ones(32).double()
    operator = EmpiricalFisherOperator(model, [batch])
    before = operator.sketched_product(sketch, v)
    assert torch.equal(operator.sketched_product(sketch, v), before)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    wanted = sketch.sketch(operator @ sketch.adjoint(v))
    assert relative(operator.sketched_product(sketch, v), wanted) < 1e-9
    assert relative(before, wanted) > 0.1


def test_losses_that_draw_random_numbers_draw_the_same_ones_each_time():
    model, batch = tiny_model("bert"), tiny_inputs("bert")

    def loss_fn(output, inputs):
        return (output.logits * torch.randn_like(output.logits)).square().mean()

    batches, sketch = [batch, batch], ModelSketch.from_model(model, 64)
    products = []
    for mode in (AUTOGRAD, FINITE):
        state = torch.get_rng_state()
        operator = HessianOperator(model, batches, loss_fn, mode=mode)
        products += [flat(operator @ direction(model)) for _ in range(2)]
        products.append(
            flat(
                GaussNewtonOperator(model, batches, loss_fn, mode=mode)
                @ direction(model)
            )
        )
        products.append(operator.sketched_product(sketch, torch.ones(64).double()))
        assert torch.equal(torch.get_rng_state(), state)
        assert operator.check.asymmetry < 1e-3
    exactly, again, newton, sketched, near, same, near_newton, near_sketched = products
    assert torch.equal(exactly, again)
    assert torch.equal(near, same)
    assert relative(near, exactly) < 1e-3
    assert relative(near_newton, newton) < 1e-3
    assert relative(near_sketched, sketched) < 1e-3
