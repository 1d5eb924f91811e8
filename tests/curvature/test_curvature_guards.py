"""What a model may carry that must not reach its Hessian, and how that is told."""

from types import MethodType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from hf_sketch import GaussNewtonOperator, HessianOperator, ModelSketch, SketchedHessian
from tests.helpers.curvature_oracles import (
    AUTOGRAD,
    BOTH,
    FINITE,
    Constant,
    Head,
    Once,
    assert_right,
    direction,
    exact,
    flat,
    head_batch,
    relative,
    trainable,
)
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


def product(model, batch, mode):
    return flat(HessianOperator(model, [batch], mode=mode) @ direction(model))


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


def test_quantised_models_get_finite_differences():
    model = Head()
    model.is_quantized = True
    assert_only_finite_differences(model, head_batch(), "the weights are quantised")


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


def test_gauss_newton_tells_the_same():
    model = Head(Once.apply)
    with pytest.raises(ValueError, match=r'backward.*Pass mode="finite_difference"'):
        GaussNewtonOperator(model, [head_batch()]) @ direction(model)
    got = GaussNewtonOperator(model, [head_batch()], mode=FINITE) @ direction(model)
    wanted = GaussNewtonOperator(Head(), [head_batch()]) @ direction(model)
    assert relative(flat(got), flat(wanted)) < 1e-3


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
def test_fused_attention_works_in_autograd_mode(operator):
    model, batch = tiny_model("llama").float(), tiny_inputs("llama")
    assert model.config._attn_implementation == "sdpa"
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(backends):
        gradient = torch.autograd.grad(
            model(**batch).loss, model.model.embed_tokens.weight, create_graph=True
        )[0]
        with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention"):
            gradient.sum().backward()
        inside = flat(operator(model, [batch], mode=AUTOGRAD) @ direction(model))
    model.set_attn_implementation("eager")
    eager = flat(operator(model, [batch], mode=AUTOGRAD) @ direction(model))
    assert relative(inside, eager) < 1e-5


@pytest.fixture
def other_attention():
    """The name of an attention kernel that cannot be differentiated twice."""

    def attention(module, query, key, value, mask, **kwargs):
        eager = module.config._attn_implementation == "eager"
        assert not eager
        calls.append(module)
        scores = query @ key.transpose(2, 3) * module.scaling
        scores = scores if mask is None else scores + mask
        weights = Once.apply(scores).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    calls = []
    AttentionInterface.register("fused-for-tests", attention)
    yield "fused-for-tests", calls
    AttentionInterface._global_mapping.pop("fused-for-tests")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_other_attention_is_replaced_by_eager_and_restored(other_attention, wrapped):
    name, calls = other_attention
    model, batch = tiny_model("bert").float(), tiny_inputs("bert")
    inner = model
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["value"], r=2))
    wanted = product(model, batch, AUTOGRAD)
    inner.set_attn_implementation(name)
    assert relative(product(model, batch, AUTOGRAD), wanted) < 1e-5
    assert inner.config._attn_implementation == name
    failing = HessianOperator(model, [batch], lambda output, inputs: output.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        failing @ direction(model)
    assert inner.config._attn_implementation == name
    assert not calls
    product(model, batch, FINITE)  # keeps the kernel
    assert calls


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
def test_each_part_of_a_model_gets_its_own_attention_back(other_attention):
    name, calls = other_attention
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_model("bert").config, tiny_model("bert").config
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model, batch = EncoderDecoderModel(config).eval(), tiny_inputs("t5")
    wanted = product(model, batch, AUTOGRAD)
    parts = {"": "eager", "encoder": "sdpa", "decoder": name}
    model.set_attn_implementation(parts)
    assert relative(product(model, batch, AUTOGRAD), wanted) < 1e-5
    assert not calls
    configs = {"": config, "encoder": config.encoder, "decoder": config.decoder}
    assert {n: c._attn_implementation for n, c in configs.items()} == parts


@pytest.fixture
def bf16_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@BOTH
def test_a_model_prepared_for_bf16_has_its_float32_hessian(mode, bf16_accelerator):
    model, batch = tiny_model("bert").float(), tiny_inputs("bert")
    single = model(**batch).logits
    bf16_accelerator.prepare_model(model)
    patched = vars(model)["forward"]
    assert not torch.equal(model(**batch).logits, single)  # in bf16, indeed
    assert_right(model, batch, mode)
    assert vars(model)["forward"] is patched
    failing = HessianOperator(model, [batch], lambda output, inputs: output.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        failing @ direction(model)
    assert vars(model)["forward"] is patched


@BOTH
def test_an_autocast_region_around_the_call_changes_nothing(mode):
    model, batch = tiny_model("llama").float(), tiny_inputs("llama")
    wanted = product(model, batch, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(model, batch, mode), wanted)


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*`:FutureWarning")
def test_activation_checkpointing_changes_nothing(mode, use_reentrant):
    model, batch = tiny_model("llama").float(), tiny_inputs("llama")
    wanted = product(model, batch, mode)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    assert torch.equal(product(model, batch, mode), wanted)
    assert model.is_gradient_checkpointing


@BOTH
def test_hooks_of_others_are_not_run_and_come_back(mode):
    model, batch = tiny_model("gpt2").float(), tiny_inputs("gpt2")
    sketch, ran = ModelSketch.from_model(model, 64), []
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = HessianOperator(model, [batch], mode=mode)
    wanted = plain.sketched_product(sketch, torch.ones(64))

    def step(parameter):
        ran.append(parameter)
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    operator = HessianOperator(model, [batch], mode=mode)
    assert torch.equal(operator.sketched_product(sketch, torch.ones(64)), wanted)
    operator @ direction(model)
    assert not ran
    assert all(torch.equal(p, theta[n]) for n, p in model.named_parameters())
    model(**batch).loss.backward()
    assert len(ran) == len(theta)
    for handle in handles:
        handle.remove()
    model(**batch).loss.backward()
    assert len(ran) == len(theta)


@BOTH
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_models_with_lora_are_right_in_its_factors(mode):
    config = LoraConfig(target_modules=["query", "value"], r=2)
    model, batch = (
        get_peft_model(tiny_model("bert").float(), config),
        tiny_inputs("bert"),
    )
    assert len(trainable(model)) == 8
    with torch.no_grad():  # B starts at zero
        for p in trainable(model).values():
            p.add_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
    operator = HessianOperator(model, [batch], mode=mode)
    wanted = exact(model, [batch], direction(model))
    # Steps are short: of the norm of the factors, not of the weights beside them.
    tolerance = 1e-5 if mode == AUTOGRAD else 1e-2
    assert relative(flat(operator @ direction(model)).double(), wanted) < tolerance
    sketch = ModelSketch.from_model(model, 16)
    wanted = sketch.sketch(operator @ sketch.adjoint(torch.ones(16)))
    got = SketchedHessian(operator, sketch) @ torch.ones(16)
    assert relative(got, wanted) < 1e-2
    assert all(p.grad is None for p in model.parameters())


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
