"""What a model may carry that must not reach its Hessian."""

import pytest
import torch
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
    Once,
    assert_right,
    direction,
    exact,
    flat,
    relative,
    trainable,
)
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


def product(model, batch, mode):
    return flat(HessianOperator(model, [batch], mode=mode) @ direction(model))


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
