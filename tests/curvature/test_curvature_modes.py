"""How a model's Hessian is computed, why, and the check of its first product."""

from types import MethodType

import pytest
import torch

from hf_sketch import GaussNewtonOperator, HessianOperator, ModelSketch
from tests.helpers.curvature_oracles import (
    AUTOGRAD,
    FINITE,
    Constant,
    Head,
    Once,
    direction,
    exact,
    flat,
    head_batch,
    relative,
    trainable,
)
from tests.helpers.tiers import full


def assert_only_finite_differences(model, batch, reason, twin=None):
    """Autograd is refused with the reason; "auto" gives finite differences."""
    twin = model if twin is None else twin
    vector = direction(twin)
    with pytest.raises(ValueError, match=f'{reason}.*Pass mode="finite_difference"'):
        HessianOperator(model, [batch], mode=AUTOGRAD) @ vector
    operator = HessianOperator(model, [batch])
    got = flat(operator @ vector)
    assert operator.mode == FINITE
    assert reason in operator.mode_reason
    assert operator.check.difference is None
    assert relative(got.double(), exact(twin, [batch], vector)) < 5e-3


@pytest.mark.parametrize("in_place", [False, *full(True)])
def test_compiled_models_get_finite_differences(in_place):
    model = Head()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    assert_only_finite_differences(model, head_batch(), "the model is compiled", Head())


def test_compiled_parts_get_finite_differences():
    model = Head()
    model.first = torch.compile(model.first, backend="eager")
    with pytest.raises(ValueError, match="first is compiled"):
        HessianOperator(model, [head_batch()], mode=AUTOGRAD)
    assert HessianOperator(model, [head_batch()]).mode == FINITE


class LigerLinear(torch.nn.Linear):
    """A linear map that passes for one of Liger's."""


LigerLinear.__module__ = "liger_kernel.transformers.linear"


def liger_forward(self, x, labels):
    return Head.forward(self, x, labels)


liger_forward.__module__ = "liger_kernel.transformers.model.llama"


@pytest.mark.parametrize("part", ["module", "forward", "class", "autocast"])
def test_liger_kernels_get_finite_differences(part, monkeypatch, bf16_accelerator):
    model = Head(dtype=torch.float32)
    if part == "module":
        model.last.__class__ = LigerLinear
    elif part == "class":
        monkeypatch.setattr(Head, "forward", liger_forward)
    else:
        model.forward = MethodType(liger_forward, model)
    if part == "autocast":
        bf16_accelerator.prepare_model(model)
    batch = head_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r'a Liger kernel.*mode="finite_difference"'):
        HessianOperator(model, [batch], mode=AUTOGRAD)
    assert HessianOperator(model, [batch]).mode == FINITE


def test_quantized_models_get_finite_differences():
    model = Head()
    model.is_quantized = True
    assert_only_finite_differences(model, head_batch(), "the weights are quantized")


def test_what_only_shows_in_the_second_backward_pass_gets_them_with_a_warning():
    model, twin = Head(Once.apply), Head()
    with pytest.warns(UserWarning, match=r"Using finite differences: .*once_diff"):
        assert_only_finite_differences(model, head_batch(), "no double backward", twin)


def test_without_the_check_the_fallback_works_too():
    model, vector = Head(Once.apply), direction(Head())
    operator = HessianOperator(model, [head_batch()], self_check=False)
    with pytest.warns(UserWarning, match="Using finite differences"):
        got = flat(operator @ vector)
    assert operator.check is None
    assert relative(got, exact(Head(), [head_batch()], vector)) < 1e-3
    sketch = ModelSketch.from_model(model, 16)
    operator = HessianOperator(model, [head_batch()], self_check=False)
    with pytest.warns(UserWarning, match="Using finite differences"):
        got = operator.sketched_product(sketch, torch.ones(16).double())
    lifted = exact(Head(), [head_batch()], sketch.adjoint(torch.ones(16).double()))
    parts = lifted.split([p.numel() for p in model.parameters()])
    named = zip(trainable(model).items(), parts, strict=True)
    wanted = sketch.sketch({n: part.view_as(p) for (n, p), part in named})
    assert relative(got, wanted) < 1e-3


def test_no_mode_is_left_for_low_precision_without_a_double_backward():
    model = Head(Once.apply, torch.bfloat16)
    batch = head_batch(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no double backward"):
        HessianOperator(model, [batch]) @ direction(model)
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"bfloat16, too coarse.*torch.float32") as e:
        HessianOperator(model, [batch])
    assert 'pass mode="autograd"' not in str(e.value)
    model.is_quantized = False
    with pytest.raises(ValueError, match=r"too coarse.*or pass mode=\"autograd\""):
        HessianOperator(model, [batch], mode=FINITE)


def test_gauss_newton_gives_the_same_results():
    model = Head(Once.apply)
    with pytest.raises(ValueError, match=r'backward.*Pass mode="finite_difference"'):
        GaussNewtonOperator(model, [head_batch()]) @ direction(model)
    got = GaussNewtonOperator(model, [head_batch()], mode=FINITE) @ direction(model)
    wanted = GaussNewtonOperator(Head(), [head_batch()]) @ direction(model)
    assert relative(flat(got), flat(wanted)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_check_finds_a_gradient_that_is_taken_for_a_constant(dtype):
    model, batch = Head(Constant.apply, dtype), head_batch(dtype=dtype)
    operator = HessianOperator(model, [batch])
    message = r"asymmetry .*, difference .*, tolerance .*wrong double.*finite_diff"
    for _ in range(2):  # it stays refused
        with pytest.raises(RuntimeError, match=message):
            operator @ direction(model)
    silent = HessianOperator(model, [batch], self_check=False) @ direction(model)
    wanted = exact(Head(), [head_batch()], direction(model))
    assert relative(flat(silent).double(), wanted) > 0.1
    mended = HessianOperator(model, [batch], mode=FINITE)
    assert relative(flat(mended @ direction(model)).double(), wanted) < 1e-2
    assert mended.check.asymmetry < 1e-2


def test_the_check_is_made_once_and_recorded():
    calls = []

    def loss_fn(output, inputs):
        calls.append(True)
        return output["loss"]

    model = Head()
    operator = HessianOperator(model, [head_batch()], loss_fn)
    assert operator.check is None
    operator @ direction(model)
    first, check = len(calls), operator.check
    assert 0 < check.difference < 1e-2
    assert check.asymmetry < 1e-9
    operator @ direction(model)
    assert len(calls) == first + 1
    assert operator.check is check
