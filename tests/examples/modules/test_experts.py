"""Rows of mixtures of experts, beside a backward pass for each example."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.examples.replay import Replay
from hf_sketch.sketches.outer import form_grouped
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import DoublePrecision, tiny_inputs

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 24, "moe_intermediate_size": 20}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
SIZES |= {"num_experts_per_tok": 2, "pad_token_id": 0}
ATTENTION = {"layer_types": ["full_attention"] * 2}
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
SHARED = {"shared_expert_intermediate_size": 12}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "head_dim": 4}
LATENT |= {"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}
KINDS = {
    "mixtral": {},
    "gpt_oss": ATTENTION,
    "qwen2_moe": SPARSE | SHARED,
    "qwen3_moe": SPARSE,
    "qwen3_next": SPARSE | SHARED | ATTENTION,
    "qwen3_5_moe_text": SHARED | ATTENTION,
    "deepseek_v3": GROUPS | LATENT | {"n_shared_experts": 1},
    "olmoe": {},
    "minimax": ATTENTION,
    "minimax_m2": {},
    "glm4_moe": GROUPS | {"n_shared_experts": 1},
    "llama4_text": {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 24},
}


def experts_model(kind, implementation, dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )
    for name, parameter in model.named_parameters():
        if "experts" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def assert_rows_are_right(model, layout, out_size, tolerance):
    inputs = tiny_inputs("mixtral")
    sketch = ModelSketch.from_model(model, out_size, layout)
    expected = []
    for index in range(len(inputs["labels"])):
        model.zero_grad()
        model(
            **{name: x[index : index + 1] for name, x in inputs.items()}
        ).loss.backward()
        named = model.named_parameters()
        expected.append(
            sketch.sketch({n: p.grad for n, p in named if p.grad is not None})
        )
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(inputs)
    for row, wanted in zip(got.rows, expected, strict=True):
        assert (row - wanted).norm() < tolerance * wanted.norm()


@pytest.fixture
def run_again(monkeypatch):
    """Paths of the modules that were run again for each example."""
    paths, of_call = set(), Replay.of_call

    def note(rule, *args):
        paths.add(rule.path)
        return of_call(rule, *args)

    monkeypatch.setattr(Replay, "of_call", note)
    return paths


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("mixtral", "grouped"),
        ("llama4_text", "blocked"),
        *full(*((kind, "grouped") for kind in KINDS if kind != "mixtral")),
    ],
)
def test_experts_have_exact_rows_without_being_run_again(kind, layout, run_again):
    model = experts_model(kind, "eager", torch.float64)
    with DoublePrecision():
        assert_rows_are_right(model, layout, 256, 1e-9)
    assert all("attn" in path for path in run_again)  # gpt-oss has sinks there


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("gpt_oss", "grouped_mm"),
        ("gpt_oss", "batched_mm"),
        *full(("mixtral", "grouped_mm"), ("mixtral", "batched_mm")),
    ],
)
def test_experts_of_every_implementation_have_a_rule(kind, implementation, run_again):
    model = experts_model(kind, implementation, torch.float32)
    assert_rows_are_right(model, "grouped", 64, 1e-5)
    assert all("attn" in path for path in run_again)  # gpt-oss has sinks there


def test_weights_with_an_operator_of_their_own_are_sketched_expert_by_expert(
    monkeypatch, run_again
):
    monkeypatch.setattr("hf_sketch.model.operators._OWN_SIZE", 2**8)
    monkeypatch.setattr("hf_sketch.sketches.outer._ELEMENTS", 2**10)
    model = experts_model("mixtral", "eager", torch.float64)
    with DoublePrecision():
        assert_rows_are_right(model, "grouped", 64, 1e-9)
    assert not run_again


def test_training_gradients_are_bit_equal_and_forward_passes_come_back():
    model, inputs = (
        experts_model("mixtral", None, torch.float32),
        tiny_inputs("mixtral"),
    )
    model(**inputs).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ExampleSketcher(model, ModelSketch.from_model(model, 64)) as sketcher:
        model(**inputs).loss.backward()
        sketcher.take()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))
    assert not any("forward" in vars(module) for module in model.modules())


def test_sums_of_outer_products_by_group_are_those_of_each_group(no_generator_use):
    numbers = torch.arange(60.0, dtype=torch.float64)
    left, right = numbers.cos().view(20, 3), numbers[:40].sin().view(20, 2)
    example, group = torch.arange(20) % 3, torch.arange(20) * 7 % 4
    group[group == 2] = 3  # a group without any
    expected = torch.zeros(3, 4, 3, 2, dtype=torch.float64)
    for place in range(20):
        product = torch.outer(left[place], right[place])
        expected[example[place], group[place]] += product
    got = torch.zeros_like(expected).flatten(1)
    for start, part in form_grouped(left, right, example, group, (3, 4)):
        got[:, start : start + part.shape[1]] += part
    torch.testing.assert_close(got, expected.flatten(1))
