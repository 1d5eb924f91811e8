import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sketch import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_vector_product,
)
from tests.helpers.curvature_oracles import (
    cross_entropy,
    flat,
    relative,
    theta_of,
    unflat,
)
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import DoublePrecision, tiny_inputs, tiny_model

_NARROW = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1}
_NARROW |= {"num_attention_heads": 2, "vocab_size": 20}
MICRO = {
    "gpt2": {"n_embd": 6, "n_layer": 1, "n_head": 2, "vocab_size": 20},
    "llama": {**_NARROW, "num_key_value_heads": 1, "head_dim": 4},
    "bert": _NARROW,
    "t5": {"d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "vocab_size": 20},
}


def micro_model(name, **config):
    """Some hundred parameters, for dense matrices."""
    return tiny_model(name, **{**MICRO[name], **config})


def micro_inputs(name, seed=1):
    batch = tiny_inputs(name, seed)
    for key in ("input_ids", "labels"):
        batch[key] = torch.where(batch[key] > 19, batch[key] % 17 + 3, batch[key])
    return batch


def function_of(model, batches, loss_of):
    """A function of the batches' outputs, as one of the parameters end to end."""

    def loss(x):
        parameters = unflat(model, x)
        return loss_of([functional_call(model, parameters, (), b) for b in batches])

    return loss


def dense(model, batches, loss_of):
    """The Hessian of a function of the batches' outputs, by torch's own `hessian`."""
    with sdpa_kernel(SDPBackend.MATH):
        function = function_of(model, batches, loss_of)
        return torch.autograd.functional.hessian(function, theta_of(model))


def exact_product(model, batches, loss_of, v):
    """One product with it, by torch's own `hvp`."""
    with sdpa_kernel(SDPBackend.MATH):
        function = function_of(model, batches, loss_of)
        return torch.autograd.functional.hvp(function, theta_of(model), v)[1]


@pytest.mark.parametrize("name", ["gpt2", *full("bert", "llama", "t5")])
def test_products_are_those_of_the_dense_hessian(name):
    model, batch = micro_model(name), micro_inputs(name)
    with DoublePrecision():
        hessian = dense(model, [batch], lambda outputs: outputs[0].loss)
        operator = HessianOperator(model, [batch])
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            v = torch.randn(len(hessian), generator=generator, dtype=torch.float64)
            got = flat(operator @ unflat(model, v))
            assert relative(got, hessian @ v) < 1e-9
    assert operator.mode == "autograd"
    assert operator.check.asymmetry < 1e-9
    assert operator.check.difference < 1e-2


@pytest.mark.parametrize("name", ["gpt2", "t5", *full("llama", "bert")])
def test_finite_differences_in_float32_are_near_the_exact_product(name):
    model, batch = tiny_model(name), tiny_inputs(name)
    sketch = ModelSketch.from_model(model, 64, seed=3)
    lifted = sketch.adjoint(torch.ones(64))
    with DoublePrecision():
        exact = HessianOperator(model, [batch], self_check=False) @ lifted
    single = HessianOperator(model.float(), [batch], mode="finite_difference")
    got = single @ lifted
    assert relative(flat(got).double(), flat(exact)) < 2e-3
    streamed = SketchedHessian(single, sketch) @ torch.ones(64)
    assert relative(streamed.double(), sketch.sketch(exact)) < 2e-3


@pytest.mark.parametrize("name", ["gpt2", *full("bert")])
def test_tokens_count_alike_whatever_batch_they_are_in(name):
    model = micro_model(name)
    whole = micro_inputs(name)
    rows = [{k: v[part] for k, v in whole.items()} for part in ([0], [1, 2], [3])]

    def mean(outputs):
        total, count = cross_entropy(outputs, rows, shift=name == "gpt2")
        return total / count

    with DoublePrecision():
        v = torch.ones_like(theta_of(model))
        wanted = exact_product(model, rows, mean, v)
        for batches in (rows, [whole]):
            got = flat(HessianOperator(model, batches) @ unflat(model, v))
            assert relative(got, wanted) < 1e-9


def test_examples_count_alike_if_asked():
    model, batch = micro_model("gpt2"), micro_inputs("gpt2")
    alone = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    with DoublePrecision():
        v = torch.ones_like(theta_of(model))
        wanted = exact_product(
            model, alone, lambda outputs: sum(o.loss for o in outputs) / 4, v
        )
        operator = HessianOperator(model, [batch], unit="examples")
        assert relative(flat(operator @ unflat(model, v)), wanted) < 1e-9
        by_token = HessianOperator(model, [batch]) @ unflat(model, v)
    assert relative(flat(by_token), wanted) > 1e-2


def test_a_loss_of_ones_own():
    model, batch = micro_model("bert"), micro_inputs("bert")

    def squares(outputs):
        return outputs[0].logits.square().mean()

    operator = HessianOperator(
        model, [batch], lambda output, inputs: output.logits.square().mean()
    )
    v = torch.ones_like(theta_of(model))
    wanted = exact_product(model, [batch], squares, v)
    assert relative(flat(operator @ unflat(model, v)), wanted) < 1e-9
    got = hessian_vector_product(
        model, [batch], unflat(model, v), operator.mean_loss.loss_fn
    )
    assert relative(flat(got), wanted) < 1e-9


@pytest.mark.parametrize("mode", ["autograd", "finite_difference"])
def test_gauss_newton_is_the_jacobian_around_the_softmax(mode):
    model, batch = micro_model("bert"), micro_inputs("bert")
    theta = flat({n: p.detach() for n, p in model.named_parameters()})

    def logits(x):
        return functional_call(model, unflat(model, x), (), batch).logits

    jacobian = torch.autograd.functional.jacobian(logits, theta)
    matrix = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for row, slope in zip(logits(theta).softmax(1), jacobian, strict=True):
        inner = row.diag() - torch.outer(row, row)
        matrix += slope.T @ inner @ slope / len(jacobian)
    v = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    got = flat(GaussNewtonOperator(model, [batch], mode=mode) @ unflat(model, v))
    tolerance = 1e-9 if mode == "autograd" else 1e-3
    assert relative(got, matrix @ v) < tolerance


def test_the_empirical_fisher_is_the_mean_of_outer_products():
    model, batch = micro_model("bert"), micro_inputs("bert")
    rows = []
    for i in range(4):
        loss = model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
        rows.append(
            flat(dict(enumerate(torch.autograd.grad(loss, model.parameters()))))
        )
    rows = torch.stack(rows)
    operator = EmpiricalFisherOperator(model, [batch])
    v = torch.linspace(-1, 1, rows.shape[1], dtype=torch.float64)
    wanted = rows.T @ (rows @ v) / 4
    assert relative(flat(operator @ unflat(model, v)), wanted) < 1e-9
    sketch = ModelSketch.from_model(model, 32)
    u = torch.linspace(-1, 1, 32, dtype=torch.float64)
    inner = flat(sketch.adjoint(u))
    wanted = sketch.sketch(unflat(model, rows.T @ (rows @ inner) / 4))
    assert relative(SketchedHessian(operator, sketch) @ u, wanted) < 1e-9


def test_the_sketched_product_is_that_of_the_three_matrices():
    model, batch = micro_model("bert"), micro_inputs("bert")
    sketch = ModelSketch.from_model(model, 32, operator="affd")
    matrix = torch.stack(
        [flat(sketch.adjoint(unit)) for unit in torch.eye(32).double()]
    )
    operator = SketchedHessian(HessianOperator(model, [batch]), sketch)
    assert (operator.size, operator.dtype) == (32, torch.float64)
    v = torch.linspace(-1, 1, 32, dtype=torch.float64)
    inner = exact_product(model, [batch], lambda outputs: outputs[0].loss, matrix.T @ v)
    assert relative(operator @ v, matrix @ inner) < 1e-9
